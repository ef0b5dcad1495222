#include "cuda/gemm/grouped_gemm_decode.cuh"

namespace moekernels {

cudaError_t launch_quantized_gemm_decode(const QuantizedGemmParams& params, const TileConfig& config,
                                         cudaStream_t stream) {
  return dispatch_dtype(params.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return dispatch_codes(params.weight.order, [&](auto codes) {
      return launch_decode_of<CodedWeight<T, typename decltype(codes)::Codes>>(params, config, stream);
    });
  });
}

}  // namespace moekernels
