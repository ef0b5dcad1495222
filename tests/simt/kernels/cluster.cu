// Clusters of two blocks: each loads half of every box into both, waits for the whole, and copies it out.
#include "cuda/common/launch.cuh"
#include "cuda/gemm/tensor_map.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

enum Fault : int64_t {
  kNoBarrierAfterInit = 1,
  kReleasesOwnBlockOnly = 2,
  kLeavesEarly = 3,
  kExpectsItsOwnHalf = 4,
  kArrivesTwice = 5,
};

constexpr int kStages = 2;
constexpr int kRows = 16;  // of a box; half of them from each block
constexpr uint32_t kHalfBytes = kRows / 2 * 128;
constexpr uint32_t kBoxBytes = 2 * kHalfBytes;
constexpr int kSmemBytes = kStages * kBoxBytes + 2 * kStages * 8 + ptx::kSwizzleAlignment;

// in [steps * kRows, 64] of 16 bits -> out [blocks, steps, kBoxBytes], as the boxes lie in shared memory. One warp
// loads, the other copies.
__global__ void cluster_kernel(const __grid_constant__ CUtensorMap in, uint4* out, int steps, int64_t fault) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  const uint32_t boxes = ptx::smem_address(ptx::align_for_swizzle(given));
  const uint32_t full = boxes + kStages * kBoxBytes;
  const uint32_t empty = full + kStages * 8;
  const uint32_t rank = ptx::cluster_ctarank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      ptx::mbarrier_init(empty + 8 * stage, 2);  // a warp of each block
    }
    ptx::fence_mbarrier_init();
  }
  if (fault == kNoBarrierAfterInit) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    if (fault == kArrivesTwice) ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const bool loads = threadIdx.x < 32;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t parity = step / kStages & 1;
    const uint32_t box = boxes + stage * kBoxBytes;
    if (loads) {
      ptx::mbarrier_wait(empty + 8 * stage, parity ^ 1);
      if (ptx::elect_one()) {
        ptx::mbarrier_arrive_expect_tx(full + 8 * stage, fault == kExpectsItsOwnHalf ? kHalfBytes : kBoxBytes);
        ptx::tma_load_3d_multicast(box + rank * kHalfBytes, &in, full + 8 * stage, 0,
                                   step * kRows + static_cast<int>(rank) * kRows / 2, 0, 3);
      }
    } else {
      ptx::mbarrier_wait(full + 8 * stage, parity);
      for (uint32_t i = threadIdx.x - 32; i < kBoxBytes / 16; i += 32) {
        out[(blockIdx.x * steps + step) * (kBoxBytes / 16) + i] = ptx::ld_shared_v4(box + 16 * i);
      }
      __syncwarp();
      if (fault == kLeavesEarly && rank == 0 && step == steps - 1) {  // until the other one is gone
        for (int i = 0; i < 40; ++i) __nanosleep(1000);
      }
      if (threadIdx.x == 32) {
        for (uint32_t other = 0; other < 2; ++other) {
          if (fault != kReleasesOwnBlockOnly) {
            ptx::mbarrier_arrive_cluster(ptx::mapa(empty + 8 * stage, other));
          } else {
            ptx::mbarrier_arrive(empty + 8 * stage);
          }
        }
      }
    }
  }
  if (fault == kLeavesEarly && rank == 1) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}

}  // namespace

extern "C" cudaError_t cluster_copy(const void* in, uint4* out, int64_t blocks, int64_t steps, int64_t fault) {
  CUtensorMap map;
  const TensorMapSource source{in, DType::kFloat16, 64, steps * kRows, 1, 64, steps * kRows * 64};
  if (const cudaError_t error = make_tensor_map(&map, source, 64, kRows / 2)) return error;
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(64), kSmemBytes};
  config.cluster = 2;
  return launch<cluster_kernel>(config, map, out, static_cast<int>(steps), fault);
}
