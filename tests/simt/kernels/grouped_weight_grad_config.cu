// The weight gradient as it is or, after set_config, grad_weight alone by the path and tiles given there.
#include "cuda/weight_grad/grouped_weight_grad.cuh"

#define run automatic_weight_grad
#include "cuda/weight_grad/grouped_weight_grad.cu"
#undef run

namespace moekernels {
namespace {

TileConfig config{};
bool automatic = true;

}  // namespace

cudaError_t run(const GroupedWeightGradParams& params, cudaStream_t stream) {
  return automatic ? automatic_weight_grad(params, stream) : grouped_weight_grad_with_config(params, config, stream);
}

}  // namespace moekernels

// path -1: back to the choice of choose_weight_grad_config
extern "C" cudaError_t set_config(int64_t path, int64_t tile_m, int64_t tile_n, int64_t stages) {
  using namespace moekernels;
  automatic = path < 0;
  config = {
      static_cast<GemmPath>(path), static_cast<int>(tile_m), static_cast<int>(tile_n), 64, static_cast<int>(stages), 1};
  return cudaSuccess;
}

// problem: num_rows, out_features, in_features, num_experts, dtype, aligned, allow_tf32, compute_capability, sm_count
// -> path, tile_m, tile_n, tile_k, stages
extern "C" cudaError_t choose(const int64_t* problem, int64_t* chosen) {
  using namespace moekernels;
  const WeightGradProblem p{problem[0],
                            problem[1],
                            problem[2],
                            static_cast<int32_t>(problem[3]),
                            static_cast<DType>(problem[4]),
                            problem[5] != 0,
                            problem[6] != 0,
                            static_cast<int>(problem[7]),
                            static_cast<int>(problem[8])};
  const TileConfig c = choose_weight_grad_config(p);
  const int64_t fields[] = {static_cast<int64_t>(c.path), c.tile_m, c.tile_n, c.tile_k, c.stages};
  std::copy(std::begin(fields), std::end(fields), chosen);
  return cudaSuccess;
}
