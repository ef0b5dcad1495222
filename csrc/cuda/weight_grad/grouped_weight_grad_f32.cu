// The weight gradient in full float32, on the CUDA cores.
#include "cuda/gemm/fma_compute.cuh"
#include "cuda/weight_grad/grouped_weight_grad_tiled.cuh"

namespace moekernels {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    grouped_weight_grad_f32_kernel(const __grid_constant__ GroupedWeightGradParams params) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_weight_grad<Traits>(params, smem);
}

}  // namespace

cudaError_t launch_grouped_weight_grad_f32(const GroupedWeightGradParams& params, const TileConfig& config,
                                           cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    return launch_tiled_weight_grad<Traits, grouped_weight_grad_f32_kernel<Traits>>(params, stream);
  };
  if (params.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  using Small = FmaCompute<64, Major::kMN, Major::kMN>;
  using Large = FmaCompute<128, Major::kMN, Major::kMN>;
  const bool aligned = has_aligned_rows(params);
  if (config.tile_m == 64 && config.stages == 4) {
    return aligned ? run(TiledGemmTraits<Small, 4, true>{}) : run(TiledGemmTraits<Small, 4, false>{});
  }
  if (config.tile_m == 128 && config.stages == 3 && aligned) return run(TiledGemmTraits<Large, 3, true>{});
  return cudaErrorInvalidValue;
}

}  // namespace moekernels
