// The ops on an NVIDIA GPU. Torch-free. Nothing here waits for the device, allocates on it or reads back from it:
// everything is enqueued on `stream`, so a caller may capture it in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "moekernels/params.h"

#pragma GCC visibility push(default)

namespace moekernels {

cudaError_t run(const RouteParams& params, cudaStream_t stream);
cudaError_t run(const PlanParams& params, cudaStream_t stream);
cudaError_t run(const PermuteParams& params, cudaStream_t stream);
cudaError_t run(const GroupedGemmParams& params, cudaStream_t stream);
cudaError_t run(const UnpermuteParams& params, cudaStream_t stream);

// Reads codes as they are, for few rows per expert; more rows take as many passes over them. What it does not serve is
// cudaErrorInvalidValue: the activations that GroupedGemmParams names; int8_rows; rows, or an expert's codes, that do
// not start at multiples of 16 bytes; bytes where 16 does not divide K; kHalves with a table or with scales in float32;
// kPairs with scales in float16; kBytes with a `map`.
cudaError_t run(const QuantizedGemmParams& params, cudaStream_t stream);

cudaError_t run(const GroupedWeightGradParams& params, cudaStream_t stream);
cudaError_t run(const ActivationParams& params, cudaStream_t stream);
cudaError_t run(const ActivationGradParams& params, cudaStream_t stream);
cudaError_t run(const UnpermuteGradParams& params, cudaStream_t stream);
cudaError_t run(const RouteGradParams& params, cudaStream_t stream);
cudaError_t run(const RouterStatsParams& params, cudaStream_t stream);
cudaError_t run(const RouterStatsGradParams& params, cudaStream_t stream);

// Bytes of device memory, 256-byte aligned, that the caller provides in `params.workspace` (0: none needed). The other
// ops need none.
int64_t workspace_bytes(const PlanParams& params);
int64_t workspace_bytes(const GroupedGemmParams& params);
int64_t workspace_bytes(const RouterStatsParams& params);

// "cudaErrorName: what it means", from the runtime that is linked into this library.
std::string describe(cudaError_t error);

}  // namespace moekernels

#pragma GCC visibility pop
