// The weight gradient by mma.sync: bf16, fp16, and float32 rounded to tf32 where the caller allows it.
#pragma once

#include "cuda/gemm/mma_compute.cuh"
#include "cuda/weight_grad/grouped_weight_grad_tiled.cuh"

namespace moekernels {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    grouped_weight_grad_sm80_kernel(const __grid_constant__ GroupedWeightGradParams params) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_weight_grad<Traits>(params, smem);
}

// One dtype; cudaErrorInvalidValue for a configuration that is not built.
template <class T>
cudaError_t launch_grouped_weight_grad_sm80_dtype(const GroupedWeightGradParams& params, const TileConfig& config,
                                                  cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_weight_grad<Traits, grouped_weight_grad_sm80_kernel<Traits>>(params, stream);
  };
  using Small = MmaCompute<T, 64, Major::kMN, Major::kMN>;
  using Large = MmaCompute<T, 128, Major::kMN, Major::kMN>;
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

#define MOEKERNELS_INSTANCE(T)                                                                                     \
  template cudaError_t launch_grouped_weight_grad_sm80_dtype<T>(const GroupedWeightGradParams&, const TileConfig&, \
                                                                cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16);
extern MOEKERNELS_INSTANCE(__half);
extern MOEKERNELS_INSTANCE(float);

}  // namespace moekernels
