#include "launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

#include "allocate.h"
#include "moekernels/cpu.h"
#ifdef MOEKERNELS_CUDA
#include <dlfcn.h>

#include "moekernels/cuda.h"
#endif

namespace moekernels {
namespace {

using torch::stable::Tensor;

// --- the kernels by the type of their parameters
// ----------------------------------------------------------------------

void run_cpu(const RouteParams& params, const Parallel& threads) {
  route_cpu(params, threads);
}
void run_cpu(const PlanParams& params, const Parallel& threads) {
  plan_cpu(params, threads);
}
void run_cpu(const PermuteParams& params, const Parallel& threads) {
  permute_cpu(params, threads);
}
void run_cpu(const GroupedGemmParams& params, const Parallel& threads) {
  grouped_gemm_cpu(params, threads);
}
void run_cpu(const GroupedWeightGradParams& params, const Parallel& threads) {
  grouped_weight_grad_cpu(params, threads);
}
void run_cpu(const UnpermuteParams& params, const Parallel& threads) {
  unpermute_cpu(params, threads);
}
void run_cpu(const ActivationParams& params, const Parallel& threads) {
  activation_cpu(params, threads);
}
void run_cpu(const ActivationGradParams& params, const Parallel& threads) {
  activation_grad_cpu(params, threads);
}
void run_cpu(const UnpermuteGradParams& params, const Parallel& threads) {
  unpermute_grad_cpu(params, threads);
}
void run_cpu(const RouteGradParams& params, const Parallel& threads) {
  route_grad_cpu(params, threads);
}
void run_cpu(const RouterStatsParams& params, const Parallel& threads) {
  router_stats_cpu(params, threads);
}
void run_cpu(const RouterStatsGradParams& params, const Parallel& threads) {
  router_stats_grad_cpu(params, threads);
}
void run_cpu(const RmsNormParams& params, const Parallel& threads) {
  rms_norm_cpu(params, threads);
}
void run_cpu(const AttentionParams& params, const Parallel& threads) {
  attention_cpu(params, threads);
}

int64_t workspace_cpu(const PlanParams& params, const Parallel& threads) {
  return plan_workspace_cpu(params, threads);
}
int64_t workspace_cpu(const GroupedGemmParams& params, const Parallel& threads) {
  return grouped_gemm_workspace_cpu(params, threads);
}
int64_t workspace_cpu(const RouterStatsParams& params, const Parallel& threads) {
  return router_stats_workspace_cpu(params, threads);
}
int64_t workspace_cpu(const GroupedWeightGradParams& params, const Parallel& threads) {
  return grouped_weight_grad_workspace_cpu(params, threads);
}
int64_t workspace_cpu(const AttentionParams& params, const Parallel& threads) {
  return attention_workspace_cpu(params, threads);
}

#ifdef MOEKERNELS_CUDA
cudaError_t run_cuda(const RouteParams& params, cudaStream_t stream) {
  return route_cuda(params, stream);
}
cudaError_t run_cuda(const PlanParams& params, cudaStream_t stream) {
  return plan_cuda(params, stream);
}
cudaError_t run_cuda(const PermuteParams& params, cudaStream_t stream) {
  return permute_cuda(params, stream);
}
cudaError_t run_cuda(const GroupedGemmParams& params, cudaStream_t stream) {
  return grouped_gemm_cuda(params, stream);
}
cudaError_t run_cuda(const GroupedWeightGradParams& params, cudaStream_t stream) {
  return grouped_weight_grad_cuda(params, stream);
}
cudaError_t run_cuda(const UnpermuteParams& params, cudaStream_t stream) {
  return unpermute_cuda(params, stream);
}
cudaError_t run_cuda(const ActivationParams& params, cudaStream_t stream) {
  return activation_cuda(params, stream);
}
cudaError_t run_cuda(const ActivationGradParams& params, cudaStream_t stream) {
  return activation_grad_cuda(params, stream);
}
cudaError_t run_cuda(const UnpermuteGradParams& params, cudaStream_t stream) {
  return unpermute_grad_cuda(params, stream);
}
cudaError_t run_cuda(const RouteGradParams& params, cudaStream_t stream) {
  return route_grad_cuda(params, stream);
}
cudaError_t run_cuda(const RouterStatsParams& params, cudaStream_t stream) {
  return router_stats_cuda(params, stream);
}
cudaError_t run_cuda(const RouterStatsGradParams& params, cudaStream_t stream) {
  return router_stats_grad_cuda(params, stream);
}

int64_t workspace_cuda(const PlanParams& params) {
  return plan_workspace_cuda(params);
}
int64_t workspace_cuda(const GroupedGemmParams& params) {
  return grouped_gemm_workspace_cuda(params);
}
int64_t workspace_cuda(const RouterStatsParams& params) {
  return router_stats_workspace_cuda(params);
}
int64_t workspace_cuda(const GroupedWeightGradParams& params) {
  return grouped_weight_grad_workspace_cuda(params);
}

const char* op_name(const RouteParams&) {
  return "route";
}
const char* op_name(const PlanParams&) {
  return "plan";
}
const char* op_name(const PermuteParams&) {
  return "permute";
}
const char* op_name(const GroupedGemmParams&) {
  return "grouped_gemm";
}
const char* op_name(const GroupedWeightGradParams&) {
  return "grouped_weight_grad";
}
const char* op_name(const UnpermuteParams&) {
  return "unpermute";
}
const char* op_name(const ActivationParams&) {
  return "activation";
}
const char* op_name(const ActivationGradParams&) {
  return "activation_grad";
}
const char* op_name(const UnpermuteGradParams&) {
  return "unpermute_grad";
}
const char* op_name(const RouteGradParams&) {
  return "route_grad";
}
const char* op_name(const RouterStatsParams&) {
  return "router_stats";
}
const char* op_name(const RouterStatsGradParams&) {
  return "router_stats_grad";
}

// torch's current stream. The CPU build of torch lacks the function, and torch loads its libraries with local
// visibility, so it is looked up in the library that is already there.
cudaStream_t current_stream(const Tensor& on) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(on.get_device_index(), &stream) != 0) {
    throw std::runtime_error(
        "moekernels: torch's current CUDA stream could not be found; is this a CUDA build of torch?");
  }
  return static_cast<cudaStream_t>(stream);
}
#endif

// --- workspace
// --------------------------------------------------------------------------------------------------------

template <typename Params>
concept HasWorkspace = requires(Params params) { params.workspace; };

// Sets params.workspace; the memory lives as long as the returned tensor (on a GPU until the stream has passed it).
template <typename Params>
Tensor allocate_workspace(Params& params, int64_t num_bytes, const Tensor& on) {
  Tensor workspace = empty_bytes(num_bytes, on);
  params.workspace = num_bytes > 0 ? workspace.data_ptr() : nullptr;
  return workspace;
}

Parallel torch_threads() {
  const auto run = [](void*, int64_t num_tasks, Parallel::Body body, void* body_context) {
    torch::stable::parallel_for(0, num_tasks, 1, [=](int64_t begin, int64_t end) { body(body_context, begin, end); });
  };
  return {run, nullptr, static_cast<int32_t>(torch::stable::get_num_threads())};
}

template <typename Params>
void launch_cpu(Params& params, [[maybe_unused]] const Tensor& on) {
  const Parallel threads = torch_threads();
  if constexpr (HasWorkspace<Params>) {
    const int64_t num_bytes = workspace_cpu(params, threads);
    if (num_bytes > 0) {
      const Tensor workspace = allocate_workspace(params, num_bytes, on);
      return run_cpu(params, threads);
    }
  }
  run_cpu(params, threads);
}

#ifdef MOEKERNELS_CUDA
template <typename Params>
concept HasCudaKernel = requires(Params params, cudaStream_t stream) { run_cuda(params, stream); };

template <typename Params>
void launch_cuda(Params& params, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  const cudaStream_t stream = current_stream(on);
  cudaError_t error;
  if constexpr (HasWorkspace<Params>) {
    const Tensor workspace = allocate_workspace(params, workspace_cuda(params), on);
    error = run_cuda(params, stream);
  } else {
    error = run_cuda(params, stream);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("moekernels::") + op_name(params) + ": " + describe(error));
  }
}
#endif

}  // namespace

template <typename Params>
void launch(Params params, const Tensor& on) {
#ifdef MOEKERNELS_CUDA
  if constexpr (HasCudaKernel<Params>) {
    if (on.is_cuda()) return launch_cuda(params, on);
  }
#endif
  launch_cpu(params, on);
}

template void launch(RouteParams, const Tensor&);
template void launch(PlanParams, const Tensor&);
template void launch(PermuteParams, const Tensor&);
template void launch(GroupedGemmParams, const Tensor&);
template void launch(GroupedWeightGradParams, const Tensor&);
template void launch(UnpermuteParams, const Tensor&);
template void launch(ActivationParams, const Tensor&);
template void launch(ActivationGradParams, const Tensor&);
template void launch(UnpermuteGradParams, const Tensor&);
template void launch(RouteGradParams, const Tensor&);
template void launch(RouterStatsParams, const Tensor&);
template void launch(RouterStatsGradParams, const Tensor&);
template void launch(RmsNormParams, const Tensor&);
template void launch(AttentionParams, const Tensor&);

}  // namespace moekernels
