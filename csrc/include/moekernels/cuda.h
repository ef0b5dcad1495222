// The ops on an NVIDIA GPU. Torch-free. Nothing here waits for the device, allocates on it or reads back from it:
// everything is enqueued on `stream`, so a caller may capture it in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "moekernels/params.h"

#pragma GCC visibility push(default)

namespace moekernels {

// Bytes of device scratch, 256-byte aligned, that the caller provides in `params.workspace` (0: none needed).
int64_t plan_workspace_cuda(const PlanParams& params);
int64_t grouped_gemm_workspace_cuda(const GroupedGemmParams& params);
int64_t grouped_weight_grad_workspace_cuda(const GroupedWeightGradParams& params);
int64_t router_stats_workspace_cuda(const RouterStatsParams& params);

// "cudaErrorName: what it means", from the runtime that is linked into this library.
std::string describe(cudaError_t error);

cudaError_t route_cuda(const RouteParams& params, cudaStream_t stream);
cudaError_t plan_cuda(const PlanParams& params, cudaStream_t stream);
cudaError_t permute_cuda(const PermuteParams& params, cudaStream_t stream);
cudaError_t grouped_gemm_cuda(const GroupedGemmParams& params, cudaStream_t stream);
cudaError_t unpermute_cuda(const UnpermuteParams& params, cudaStream_t stream);

cudaError_t grouped_weight_grad_cuda(const GroupedWeightGradParams& params, cudaStream_t stream);
cudaError_t activation_cuda(const ActivationParams& params, cudaStream_t stream);
cudaError_t activation_grad_cuda(const ActivationGradParams& params, cudaStream_t stream);
cudaError_t unpermute_grad_cuda(const UnpermuteGradParams& params, cudaStream_t stream);
cudaError_t route_grad_cuda(const RouteGradParams& params, cudaStream_t stream);
cudaError_t router_stats_cuda(const RouterStatsParams& params, cudaStream_t stream);
cudaError_t router_stats_grad_cuda(const RouterStatsGradParams& params, cudaStream_t stream);

}  // namespace moekernels

#pragma GCC visibility pop
