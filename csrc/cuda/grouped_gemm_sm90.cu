// Launches the Hopper grouped GEMM: makes the tensor maps and picks the instantiation that the configuration names.
#include "grouped_gemm_sm90.cuh"

namespace moekernels {

// The instantiations are in grouped_gemm_sm90_{bf16,fp16}_{128,256}.cu.
#define MOEKERNELS_EXTERN(T, tile_n, gated)                                                      \
  extern template cudaError_t launch_grouped_gemm_sm90<GroupedGemmSm90Traits<T, tile_n, gated>>( \
      const GroupedGemmParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t);
MOEKERNELS_EXTERN(__nv_bfloat16, 128, false)
MOEKERNELS_EXTERN(__nv_bfloat16, 128, true)
MOEKERNELS_EXTERN(__nv_bfloat16, 256, false)
MOEKERNELS_EXTERN(__nv_bfloat16, 256, true)
MOEKERNELS_EXTERN(__half, 128, false)
MOEKERNELS_EXTERN(__half, 128, true)
MOEKERNELS_EXTERN(__half, 256, false)
MOEKERNELS_EXTERN(__half, 256, true)
#undef MOEKERNELS_EXTERN

namespace {

constexpr int kBoxColumns = 64;  // 128 bytes: what the swizzle spans
constexpr int kRowBox = GroupedGemmSm90Traits<__half, 128, false>::kRowBox;

// Whether this build has machine code for Hopper. (Code for an older architecture would run there, but is a trap.)
constexpr bool has_sm90_code() {
#ifdef __CUDA_ARCH_LIST__
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (architecture == 900) return true;
  }
  return false;
#else
  return true;
#endif
}

// weight [E, M, K]: one box is a tile's weight rows or, gated, the gates or the values among them.
cudaError_t weight_tensor_map(CUtensorMap* map, const GroupedGemmParams& p, const TileConfig& config) {
  const TensorMapSource source{
      p.weight, p.dtype, p.in_features, p.out_features, p.num_experts, p.weight_row_stride, p.weight_expert_stride};
  return cached_tensor_map(map, source, kBoxColumns, p.gated ? config.tile_n / 2 : config.tile_n);
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
    return dispatch_bool(params.gated, [&](auto is_gated) {
      constexpr bool kGated = decltype(is_gated)::value;
      const auto with = [&](auto traits) {
        return launch_grouped_gemm_sm90<decltype(traits)>(params, config, weight_map, rows_map, stream);
      };
      switch (config.tile_n) {
        case 128:
          return with(GroupedGemmSm90Traits<T, 128, kGated>{});
        case 256:
          return with(GroupedGemmSm90Traits<T, 256, kGated>{});
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace moekernels
