#include "grouped_gemm_sm80.cuh"

namespace moekernels {

template cudaError_t launch_grouped_gemm_sm80_dtype<float, true>(const GroupedGemmParams&, const TileConfig&,
                                                                 cudaStream_t);

}  // namespace moekernels
