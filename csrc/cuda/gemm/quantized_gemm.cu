// The entry of the grouped GEMM with a quantised weight. Callers choose it for as few rows as prefers_decode
// (tile_config.h) does; with many it is right, but reads the codes once more for every few rows of an expert.
#include "cuda/common/launch.cuh"
#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {

cudaError_t run(const QuantizedGemmParams& params, cudaStream_t stream) {
  const GroupedGemmParams& gemm = params.gemm;
  if (is_beyond_epilogue(gemm)) return cudaErrorInvalidValue;
  if (is_empty(gemm)) return cudaSuccess;
  if (gemm.num_experts == 0) return store_zeros(gemm, stream);
  DeviceInfo device;
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const GemmProblem problem = gemm_problem(gemm, device.compute_capability, device.sm_count);
  return launch_quantized_gemm_decode(params, decode_config(problem, bits_of(params.weight.order)), stream);
}

}  // namespace moekernels
