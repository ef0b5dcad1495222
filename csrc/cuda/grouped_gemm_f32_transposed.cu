#include "grouped_gemm_f32.cuh"

namespace moekernels {

template cudaError_t launch_grouped_gemm_f32_tiles<true>(const GroupedGemmParams&, const TileConfig&, cudaStream_t);

}  // namespace moekernels
