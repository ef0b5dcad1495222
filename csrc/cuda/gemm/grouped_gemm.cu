// The grouped GEMM's entry: choose a path, launch it.
#include "cuda/gemm/grouped_gemm.cuh"

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/gemm/expert_weight.cuh"

namespace moekernels {
namespace {

cudaError_t launch_path(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  switch (config.path) {
    case GemmPath::kF32:
      return launch_grouped_gemm_f32(params, config, stream);
    case GemmPath::kSm80:
      return launch_grouped_gemm_sm80(params, config, stream);
    case GemmPath::kSm90:
      return launch_grouped_gemm_sm90(params, config, stream);
    case GemmPath::kDecode:
      return launch_grouped_gemm_decode(params, config, stream);
  }
  return cudaErrorInvalidValue;
}

// Experts [first, first + count).
GroupedGemmParams some_experts(GroupedGemmParams params, int32_t first, int32_t count) {
  const auto advance = [&params](const void* pointer, int64_t elements) -> const void* {
    if (pointer == nullptr) return nullptr;
    return static_cast<const unsigned char*>(pointer) + elements * size_of(params.dtype);
  };
  params.weight = advance(params.weight, first * params.weight_expert_stride);
  params.bias = advance(params.bias, first * params.bias_stride);
  if (params.weight_parts != nullptr) params.weight_parts += int64_t{first} * params.num_parts;
  if (params.bias_parts != nullptr) params.bias_parts += int64_t{first} * params.num_parts;
  if (has_table(params))
    params.workspace = static_cast<TableEntry*>(params.workspace) + int64_t{first} * params.num_parts;
  params.expert_offsets += first;
  params.num_experts = count;
  return params;
}

}  // namespace

cudaError_t grouped_gemm_with_config(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  if (is_beyond_epilogue(params)) return cudaErrorInvalidValue;
  if (is_empty(params)) return cudaSuccess;
  if (params.num_experts == 0) return store_zeros(params, stream);
  if (const cudaError_t error = store_table(params, stream); error != cudaSuccess) return error;
  // Each launch also clears the rows past its own experts; the next one fills in what belongs to its own.
  for (int32_t first = 0; first < params.num_experts; first += kMaxExpertsPerLaunch) {
    const int32_t count = std::min(params.num_experts - first, kMaxExpertsPerLaunch);
    const cudaError_t error = launch_path(some_experts(params, first, count), config, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t run(const GroupedGemmParams& params, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  DeviceInfo device;
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const GemmProblem problem = gemm_problem(params, device.compute_capability, device.sm_count);
  return grouped_gemm_with_config(params, choose_tile_config(problem), stream);
}

int64_t workspace_bytes(const GroupedGemmParams& params) {
  return is_empty(params) ? 0 : table_bytes(params);
}

}  // namespace moekernels
