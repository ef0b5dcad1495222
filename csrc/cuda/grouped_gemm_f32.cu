#include "grouped_gemm_f32.cuh"

namespace moekernels {

cudaError_t launch_grouped_gemm_f32(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_gemm<Traits, grouped_gemm_f32_kernel<Traits>>(params, config, stream);
  };
  if (params.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  const bool aligned = has_aligned_rows(params);
  if (config.tile_m == 64 && config.stages == 4) {
    using Compute = FmaCompute<64>;
    return aligned ? run(TiledGemmTraits<Compute, 4, true>{}) : run(TiledGemmTraits<Compute, 4, false>{});
  }
  if (config.tile_m == 128 && config.stages == 3 && aligned) return run(TiledGemmTraits<FmaCompute<128>, 3, true>{});
  return cudaErrorInvalidValue;
}

}  // namespace moekernels
