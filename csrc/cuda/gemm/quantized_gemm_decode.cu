#include "cuda/gemm/grouped_gemm_decode.cuh"

namespace moekernels {

cudaError_t launch_quantized_gemm_decode(const QuantizedGemmParams& params, const TileConfig& config,
                                         cudaStream_t stream) {
  return dispatch_dtype(params.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    switch (params.weight.order) {
      case CodeOrder::kHalves:
        return launch_decode_of<HalvesWeight<T>>(params, config, stream);
      case CodeOrder::kPairs:
        return launch_decode_of<PairsWeight<T>>(params, config, stream);
      case CodeOrder::kBytes:
        return launch_decode_of<BytesWeight<T>>(params, config, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace moekernels
