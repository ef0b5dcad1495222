// Launches the Hopper weight gradient: makes the tensor maps and picks the instantiation that the configuration names.
#include "cuda/weight_grad/grouped_weight_grad_sm90.cuh"

namespace moekernels {

namespace {

// One box is a block of a stage. Gathered rows need no map.
cudaError_t block_tensor_map(CUtensorMap* map, const RaggedRows& from, int64_t num_rows, DType dtype) {
  using Traits = WeightGradSm90Traits<__half, 128>;
  if (from.token_of_row != nullptr) return cudaSuccess;
  const TensorMapSource source{from.data, dtype, from.width, num_rows, 1, from.stride, num_rows * from.stride};
  return cached_tensor_map(map, source, Traits::kBlockColumns, Traits::kTileK);
}

}  // namespace

cudaError_t launch_grouped_weight_grad_sm90(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream) {
  CUtensorMap grad_map{};
  CUtensorMap rows_map{};
  bool possible = has_sm90_code() && has_aligned_rows(params) && params.num_rows > 0;
  const auto can_map = [&params](CUtensorMap* map, const RaggedRows& from) {
    return block_tensor_map(map, from, params.num_rows, params.dtype) == cudaSuccess;
  };
  possible = possible && can_map(&grad_map, ragged_grad_rows(params)) && can_map(&rows_map, ragged_rows(params));
  if (!possible) {  // strides the driver refuses, no driver entry point: rare, and served as well
    DeviceInfo device{};
    if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
    const WeightGradProblem problem = weight_grad_problem(params, device.compute_capability, device.sm_count);
    return launch_grouped_weight_grad_sm80(params, weight_grad_sm80_config(problem), stream);
  }

  return dispatch_half_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (config.tile_n) {
      case 128:
        return launch_weight_grad_sm90<WeightGradSm90Traits<T, 128>>(params, config, grad_map, rows_map, stream);
      case 256:
        return launch_weight_grad_sm90<WeightGradSm90Traits<T, 256>>(params, config, grad_map, rows_map, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace moekernels
