#include "cuda/gemm/grouped_gemm_f32.cuh"

namespace moekernels {

cudaError_t launch_grouped_gemm_f32(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  if (params.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  return dispatch_bool(params.transposed, [&](auto transposed) {
    return launch_grouped_gemm_f32_tiles<decltype(transposed)::value>(params, config, stream);
  });
}

}  // namespace moekernels
