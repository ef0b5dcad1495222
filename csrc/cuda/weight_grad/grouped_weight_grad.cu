// The weight gradient's entry: choose a path, launch it.
#include "cuda/weight_grad/grouped_weight_grad.cuh"

#include <algorithm>

#include "cuda/common/launch.cuh"

namespace moekernels {

cudaError_t grouped_weight_grad_with_config(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream) {
  switch (config.path) {
    case GemmPath::kF32:
      return launch_grouped_weight_grad_f32(params, config, stream);
    case GemmPath::kSm80:
      return launch_grouped_weight_grad_sm80(params, config, stream);
    case GemmPath::kSm90:
      return launch_grouped_weight_grad_sm90(params, config, stream);
    case GemmPath::kDecode:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t run(const GroupedWeightGradParams& params, cudaStream_t stream) {
  if (params.num_experts == 0 || params.out_features == 0) return cudaSuccess;
  if (std::max({params.num_rows, params.out_features, params.in_features}) > kMostRowsOrFeatures) {
    return cudaErrorInvalidValue;
  }
  if (params.grad_bias != nullptr) {
    if (const cudaError_t error = launch_grouped_bias_grad(params, stream); error != cudaSuccess) return error;
  }
  if (params.grad_weight == nullptr || params.in_features == 0) return cudaSuccess;
  DeviceInfo device{};
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const WeightGradProblem problem = weight_grad_problem(params, device.compute_capability, device.sm_count);
  return grouped_weight_grad_with_config(params, choose_weight_grad_config(problem), stream);
}

}  // namespace moekernels
