#include "grouped_gemm_sm90.cuh"

namespace moekernels {

template cudaError_t launch_grouped_gemm_sm90<GroupedGemmSm90Traits<__nv_bfloat16, 128, false, true>>(
    const GroupedGemmParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t);
template cudaError_t launch_grouped_gemm_sm90<GroupedGemmSm90Traits<__nv_bfloat16, 256, false, true>>(
    const GroupedGemmParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t);

}  // namespace moekernels
