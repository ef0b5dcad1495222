#include "grouped_gemm_decode.cuh"

namespace moekernels {

template cudaError_t launch_grouped_gemm_decode_dtype<float>(const GroupedGemmParams&, const TileConfig&, cudaStream_t);

}  // namespace moekernels
