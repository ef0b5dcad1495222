#include "cuda/gemm/grouped_gemm_decode.cuh"

namespace moekernels {

cudaError_t launch_grouped_gemm_decode(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch_decode_of<PlainWeight<T>>(params, config, stream);
  });
}

}  // namespace moekernels
