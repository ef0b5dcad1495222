// The entry of the grouped GEMM with a quantised weight.
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
  const TileConfig config = quantized_config(problem, bits_of(params.weight.order));
  if (config.path == GemmPath::kDecode) return launch_quantized_gemm_decode(params, config, stream);
  return launch_quantized_gemm_sm80(params, config, stream);
}

}  // namespace moekernels
