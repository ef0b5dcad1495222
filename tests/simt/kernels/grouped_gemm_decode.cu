// The grouped GEMM on the decode path, with the tiles that set_decode_tiles has set, or those of decode_config.
#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {
namespace {

TileConfig chosen{};
bool automatic = true;

}  // namespace

cudaError_t run(const GroupedGemmParams& params, cudaStream_t stream) {
  return launch_grouped_gemm_decode(params, automatic ? decode_config(gemm_problem(params, 90, 132)) : chosen, stream);
}

}  // namespace moekernels

extern "C" cudaError_t set_decode_tiles(int64_t tile_m, int64_t tile_n, int64_t tile_k) {
  using namespace moekernels;
  automatic = tile_m == 0;
  chosen = {GemmPath::kDecode, static_cast<int>(tile_m), static_cast<int>(tile_n), static_cast<int>(tile_k), 1, 1};
  return cudaSuccess;
}

// config [4] = path and tiles that choose_tile_config names
extern "C" cudaError_t choose(int32_t* config, int64_t num_rows, int64_t out_features, int64_t in_features,
                              int64_t num_experts, int64_t dtype, int64_t aligned, int64_t batch_invariant) {
  using namespace moekernels;
  GemmProblem problem{};
  problem.num_rows = num_rows;
  problem.out_features = out_features;
  problem.in_features = in_features;
  problem.num_experts = static_cast<int32_t>(num_experts);
  problem.dtype = static_cast<DType>(dtype);
  problem.aligned = aligned != 0;
  problem.batch_invariant = batch_invariant != 0;
  problem.compute_capability = 90;
  problem.sm_count = 132;
  const TileConfig c = choose_tile_config(problem);
  config[0] = static_cast<int32_t>(c.path);
  config[1] = c.tile_m;
  config[2] = c.tile_n;
  config[3] = c.tile_k;
  return cudaSuccess;
}
