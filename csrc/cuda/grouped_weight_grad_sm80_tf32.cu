#include "grouped_weight_grad_sm80.cuh"

namespace moekernels {

template cudaError_t launch_grouped_weight_grad_sm80_dtype<float>(const GroupedWeightGradParams&, const TileConfig&,
                                                                  cudaStream_t);

}  // namespace moekernels
