#include "cuda/gemm/quantized_gemm_sm80.cuh"

namespace moekernels {
namespace {

template <class T, class Codes>
cudaError_t launch_codes(const QuantizedGemmParams& params, const TileConfig& config, cudaStream_t stream) {
  return dispatch_bool(params.gemm.transposed, [&](auto transposed) {
    constexpr bool kTransposed = decltype(transposed)::value;
    if (config.tile_m == 64) return launch_quantized_gemm_sm80_tile<T, Codes, 64, kTransposed>(params, config, stream);
    if (config.tile_m == 128) {
      return launch_quantized_gemm_sm80_tile<T, Codes, 128, kTransposed>(params, config, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t launch_quantized_gemm_sm80(const QuantizedGemmParams& params, const TileConfig& config,
                                       cudaStream_t stream) {
  return dispatch_half_dtype(params.gemm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return dispatch_codes(params.weight.order, [&](auto codes) {
      return launch_codes<T, typename decltype(codes)::Codes>(params, config, stream);
    });
  });
}

}  // namespace moekernels
