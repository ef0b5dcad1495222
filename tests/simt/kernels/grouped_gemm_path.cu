// The grouped GEMM on the path named by the macro PATH, whatever choose_tile_config would say: with the configuration
// that set_config has set.
#include "cuda/gemm/grouped_gemm.cuh"

#define PASTE(a, b) a##b
#define LAUNCHER(path) PASTE(launch_grouped_gemm_, path)

namespace moekernels {
namespace {

TileConfig config{};

}  // namespace

cudaError_t run(const GroupedGemmParams& params, cudaStream_t stream) {
  return LAUNCHER(PATH)(params, config, stream);
}

}  // namespace moekernels

extern "C" cudaError_t set_config(int64_t tile_m, int64_t stages, int64_t group_m) {
  moekernels::config.tile_m = static_cast<int>(tile_m);
  moekernels::config.stages = static_cast<int>(stages);
  moekernels::config.group_m = static_cast<int>(group_m);
  return cudaSuccess;
}
