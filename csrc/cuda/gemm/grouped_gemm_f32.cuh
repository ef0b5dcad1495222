// Grouped GEMM in full float32, on the CUDA cores.
#pragma once

#include "cuda/gemm/fma_compute.cuh"
#include "cuda/gemm/grouped_gemm_tiled.cuh"

namespace moekernels {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    grouped_gemm_f32_kernel(GroupedGemmParams params, int group_m) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_gemm<Traits>(params, group_m, smem);
}

// cudaErrorInvalidValue for a configuration that is not built.
template <bool kTransposed>
cudaError_t launch_grouped_gemm_f32_tiles(const GroupedGemmParams& params, const TileConfig& config,
                                          cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_gemm<Traits, grouped_gemm_f32_kernel<Traits>>(params, config, stream);
  };
  constexpr Major kWeightsMajor = kTransposed ? Major::kMN : Major::kK;
  using Small = FmaCompute<64, Major::kK, kWeightsMajor>;
  using Large = FmaCompute<128, Major::kK, kWeightsMajor>;
  const bool aligned = has_aligned_rows(params);
  if (config.tile_m == 64 && config.stages == 4) {
    return aligned ? run(TiledGemmTraits<Small, 4, true>{}) : run(TiledGemmTraits<Small, 4, false>{});
  }
  if (config.tile_m == 128 && config.stages == 3 && aligned) return run(TiledGemmTraits<Large, 3, true>{});
  return cudaErrorInvalidValue;
}

#define MOEKERNELS_INSTANCE(transposed)                                                                       \
  template cudaError_t launch_grouped_gemm_f32_tiles<transposed>(const GroupedGemmParams&, const TileConfig&, \
                                                                 cudaStream_t)
extern MOEKERNELS_INSTANCE(true);

}  // namespace moekernels
