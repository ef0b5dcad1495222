#include "grouped_weight_grad_sm90.cuh"

namespace moekernels {

template cudaError_t launch_weight_grad_sm90<WeightGradSm90Traits<__nv_bfloat16, 128>>(
    const GroupedWeightGradParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t);
template cudaError_t launch_weight_grad_sm90<WeightGradSm90Traits<__nv_bfloat16, 256>>(
    const GroupedWeightGradParams&, const TileConfig&, const CUtensorMap&, const CUtensorMap&, cudaStream_t);

}  // namespace moekernels
