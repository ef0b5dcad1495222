// The grouped GEMM with a quantised weight by mma.sync, with the tiles that set_config has set.
#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {
namespace {

TileConfig config{};

}  // namespace

cudaError_t run(const QuantizedGemmParams& params, cudaStream_t stream) {
  return launch_quantized_gemm_sm80(params, config, stream);
}

}  // namespace moekernels

extern "C" cudaError_t set_config(int64_t tile_m, int64_t stages, int64_t group_m) {
  moekernels::config.tile_m = static_cast<int>(tile_m);
  moekernels::config.stages = static_cast<int>(stages);
  moekernels::config.group_m = static_cast<int>(group_m);
  return cudaSuccess;
}

// config [3] = path, rows of a tile and stages of quantized_config, for a weight [experts, 2048, 2048] in 4 bits
extern "C" cudaError_t choose(int32_t* config, int64_t num_rows, int64_t num_experts, int64_t dtype, int64_t transposed,
                              int64_t batch_invariant, int64_t compute_capability) {
  using namespace moekernels;
  GemmProblem problem{};
  problem.num_rows = num_rows;
  problem.num_experts = static_cast<int32_t>(num_experts);
  problem.out_features = problem.in_features = 2048;
  problem.dtype = static_cast<DType>(dtype);
  problem.aligned = true;
  problem.transposed = transposed != 0;
  problem.batch_invariant = batch_invariant != 0;
  problem.compute_capability = static_cast<int>(compute_capability);
  problem.sm_count = 132;
  const TileConfig c = quantized_config(problem, 4);
  config[0] = static_cast<int32_t>(c.path);
  config[1] = c.tile_m;
  config[2] = c.stages;
  return cudaSuccess;
}
