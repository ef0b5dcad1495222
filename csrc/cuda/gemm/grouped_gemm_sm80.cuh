// Grouped GEMM by mma.sync: bf16, fp16, and float32 rounded to tf32 where the caller allows it.
#pragma once

#include "cuda/gemm/grouped_gemm_tiled.cuh"
#include "cuda/gemm/mma_compute.cuh"

namespace moekernels {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    grouped_gemm_sm80_kernel(GroupedGemmParams params, int group_m) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_gemm<Traits>(params, group_m, smem);
}

// One dtype; cudaErrorInvalidValue for a configuration that is not built.
template <class T, bool kTransposed>
cudaError_t launch_grouped_gemm_sm80_dtype(const GroupedGemmParams& params, const TileConfig& config,
                                           cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_gemm<Traits, grouped_gemm_sm80_kernel<Traits>>(params, config, stream);
  };
  constexpr Major kWeightsMajor = kTransposed ? Major::kMN : Major::kK;
  using Small = MmaCompute<T, 64, Major::kK, kWeightsMajor>;
  using Large = MmaCompute<T, 128, Major::kK, kWeightsMajor>;
  const bool aligned = has_aligned_rows(params);
  if (config.tile_m == 64 && config.stages == 4) {
    return aligned ? run(TiledGemmTraits<Small, 4, true>{}) : run(TiledGemmTraits<Small, 4, false>{});
  }
  if (config.tile_m == 128 && aligned) {
    if (config.stages == 4) return run(TiledGemmTraits<Large, 4, true>{});
    if (config.stages == 3) return run(TiledGemmTraits<Large, 3, true>{});
  }
  return cudaErrorInvalidValue;
}

#define MOEKERNELS_INSTANCE(T, transposed)                                                                        \
  template cudaError_t launch_grouped_gemm_sm80_dtype<T, transposed>(const GroupedGemmParams&, const TileConfig&, \
                                                                     cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16, false);
extern MOEKERNELS_INSTANCE(__nv_bfloat16, true);
extern MOEKERNELS_INSTANCE(__half, false);
extern MOEKERNELS_INSTANCE(__half, true);
extern MOEKERNELS_INSTANCE(float, false);
extern MOEKERNELS_INSTANCE(float, true);

}  // namespace moekernels
