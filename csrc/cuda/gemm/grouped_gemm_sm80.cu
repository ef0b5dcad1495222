#include "cuda/gemm/grouped_gemm_sm80.cuh"

namespace moekernels {

cudaError_t launch_grouped_gemm_sm80(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return dispatch_bool(params.transposed, [&](auto transposed) {
      return launch_grouped_gemm_sm80_dtype<T, decltype(transposed)::value>(params, config, stream);
    });
  });
}

}  // namespace moekernels
