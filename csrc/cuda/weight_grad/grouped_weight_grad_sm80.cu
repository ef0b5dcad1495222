#include "cuda/weight_grad/grouped_weight_grad_sm80.cuh"

namespace moekernels {

cudaError_t launch_grouped_weight_grad_sm80(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch_grouped_weight_grad_sm80_dtype<T>(params, config, stream);
  });
}

}  // namespace moekernels
