#include "grouped_gemm_decode.cuh"

namespace moekernels {

template cudaError_t launch_grouped_gemm_decode_dtype<__half>(const GroupedGemmParams&, const TileConfig&,
                                                              cudaStream_t);

}  // namespace moekernels
