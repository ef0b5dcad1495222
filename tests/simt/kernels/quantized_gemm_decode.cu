// The grouped GEMM with a quantised weight, with the tiles that set_decode_tiles has set, or those of decode_config.
#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {
namespace {

TileConfig chosen{};
bool automatic = true;

}  // namespace

cudaError_t run(const QuantizedGemmParams& params, cudaStream_t stream) {
  const TileConfig usual = decode_config(gemm_problem(params.gemm, 90, 132), bits_of(params.weight.order));
  return launch_quantized_gemm_decode(params, automatic ? usual : chosen, stream);
}

}  // namespace moekernels

extern "C" cudaError_t set_decode_tiles(int64_t tile_m, int64_t tile_n, int64_t tile_k) {
  using namespace moekernels;
  automatic = tile_m == 0;
  chosen = {GemmPath::kDecode, static_cast<int>(tile_m), static_cast<int>(tile_n), static_cast<int>(tile_k), 1, 1};
  return cudaSuccess;
}

// config [3] = the tiles of decode_config for codes of so many bits, on a GPU of 132 multiprocessors
extern "C" cudaError_t usual_tiles(int32_t* config, int64_t num_rows, int64_t num_experts, int64_t out_features,
                                   int64_t dtype, int64_t bits) {
  using namespace moekernels;
  GemmProblem problem{};
  problem.num_rows = num_rows;
  problem.num_experts = static_cast<int32_t>(num_experts);
  problem.out_features = out_features;
  problem.dtype = static_cast<DType>(dtype);
  problem.sm_count = 132;
  const TileConfig c = decode_config(problem, static_cast<int>(bits));
  config[0] = c.tile_m;
  config[1] = c.tile_n;
  config[2] = c.tile_k;
  return cudaSuccess;
}
