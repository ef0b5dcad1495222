// Launches the Hopper grouped GEMM: makes the tensor maps and picks the instantiation that the configuration names.
#include "cuda/gemm/grouped_gemm_sm90.cuh"

namespace moekernels {

namespace {

constexpr int kBoxColumns = 64;  // 128 bytes: what the swizzle spans
constexpr int kTransposedBox = GroupedGemmSm90Traits<__half, 128, false, true>::kTileK;
constexpr int kRowBox = GroupedGemmSm90Traits<__half, 128, false>::kRowBox;

// weight [E, M, K]: one box is half of a tile's weight rows: gated, the gates or the values among them. [E, K, M]: one
// box is 64 of a tile's columns.
cudaError_t weight_tensor_map(CUtensorMap* map, const GroupedGemmParams& p, const TileConfig& config) {
  if (p.transposed) {
    const TensorMapSource source{
        p.weight, p.dtype, p.out_features, p.in_features, p.num_experts, p.weight_row_stride, p.weight_expert_stride};
    return cached_tensor_map(map, source, kBoxColumns, kTransposedBox);
  }
  const TensorMapSource source{
      p.weight, p.dtype, p.in_features, p.out_features, p.num_experts, p.weight_row_stride, p.weight_expert_stride};
  return cached_tensor_map(map, source, kBoxColumns, config.tile_n / 2);
}

// rows [N, K]; one box is what one consumer takes.
cudaError_t rows_tensor_map(CUtensorMap* map, const GroupedGemmParams& p) {
  const TensorMapSource source{p.rows, p.dtype, p.in_features, p.num_rows, 1, p.row_stride, p.num_rows * p.row_stride};
  return cached_tensor_map(map, source, kBoxColumns, kRowBox);
}

}  // namespace

cudaError_t launch_grouped_gemm_sm90(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  CUtensorMap weight_map{};
  CUtensorMap rows_map{};
  bool possible = has_sm90_code() && has_aligned_rows(params) && params.in_features > 0;
  possible = possible && weight_tensor_map(&weight_map, params, config) == cudaSuccess;
  possible = possible && (params.token_of_row != nullptr || rows_tensor_map(&rows_map, params) == cudaSuccess);
  if (!possible) {  // strides the driver refuses, no driver entry point: rare, and served as well
    DeviceInfo device{};
    if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
    const GemmProblem problem = gemm_problem(params, device.compute_capability, device.sm_count);
    return launch_grouped_gemm_sm80(params, sm80_config(problem), stream);
  }

  return dispatch_half_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto with = [&](auto traits) {
      return launch_grouped_gemm_sm90<decltype(traits)>(params, config, weight_map, rows_map, stream);
    };
    if (config.tile_n != 128 && config.tile_n != 256) return cudaErrorInvalidValue;
    return dispatch_bool(config.tile_n == 256, [&](auto is_wide) {
      constexpr int kTileN = decltype(is_wide)::value ? 256 : 128;
      if (params.transposed) return with(GroupedGemmSm90Traits<T, kTileN, false, true>{});
      if (params.gated) return with(GroupedGemmSm90Traits<T, kTileN, true>{});
      return with(GroupedGemmSm90Traits<T, kTileN, false>{});
    });
  });
}

}  // namespace moekernels
