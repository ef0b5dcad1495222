// A warp-specialised GEMM tile, small but with everything a Hopper kernel has, and a fault to choose.
//
// out [rows, columns] = a [rows, depth] b [columns, depth]^T, bf16, one block per 64 rows and 64 columns.
// Warpgroup 1 produces: 128 threads copy a by cp.async, one of them b by TMA. Warpgroup 0 consumes by wgmma and stores
// the tile by TMA. full[s]: 1 + 128 arrivals and the bytes of b; empty[s]: one arrival per consumer warp.
// Warpgroup 2 has nothing to do and leaves.
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/gemm/tensor_map.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace moekernels;

enum Fault : int {
  kNoProxyFence = 1,
  kTooFewBytes = 2,
  kTooManyBytes = 3,
  kWrongFullParity = 4,
  kWrongEmptyParity = 5,
  kReleasedTooEarly = 6,
  kNoWgmmaFence = 7,
  kTouchedInFlight = 8,
  kNoInitFence = 9,
  kTooFewArrivals = 10,
  kWrongSwizzle = 11,
  kNoSyncAfterInit = 12,
  kNoStoreFence = 13,
  kStoreNotAwaited = 14,
  kRegistersMissing = 15,
  kReadBeforeWait = 16,
  kOneWarpReleases = 17,
  kTooManyArrivals = 18,
  kExitsWithCopies = 19,
};

constexpr int kStages = 2;
constexpr int kTile = 64;
constexpr uint32_t kTileBytes = kTile * 128;
constexpr int kSmemBytes = (2 * kStages + 1) * kTileBytes + 2 * kStages * 8 + ptx::kSwizzleAlignment;

[[maybe_unused]] __device__ uint32_t swizzled_chunk(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

__global__ void __launch_bounds__(384, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ CUtensorMap out_map,
                const __nv_bfloat16* a, int rows, int depth, int fault) {
#if MOEKERNELS_SM90A
  MOEKERNELS_DYNAMIC_SMEM(given);
  unsigned char* const raw = ptx::align_for_swizzle(given);
  const uint32_t a_tiles = ptx::smem_address(raw);
  const uint32_t b_tiles = a_tiles + kStages * kTileBytes;
  const uint32_t out_tile = b_tiles + kStages * kTileBytes;
  const uint32_t full = out_tile + kTileBytes;
  const uint32_t empty = full + kStages * 8;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = __shfl_sync(0xFFFFFFFF, tid / 32, 0);
  const int lane = tid % 32;
  const int row0 = static_cast<int>(blockIdx.x) * kTile;
  const int column0 = static_cast<int>(blockIdx.y) * kTile;
  const int num_steps = (depth + kTile - 1) / kTile;

  if (tid == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, fault == kTooFewArrivals ? 128 : 1 + 128);
      ptx::mbarrier_init(empty + 8 * s, fault == kOneWarpReleases ? 1 : 4);
    }
    if (fault != kNoInitFence) ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&b_map);
  }
  if (fault != kNoSyncAfterInit) __syncthreads();

  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (warp >= 8) return;
  if (warp >= 4) {
    if (fault != kRegistersMissing) ptx::setmaxnreg_dec<56>();
    const int p = tid - 128;
    for (int step = 0; step < num_steps; ++step) {
      ptx::mbarrier_wait(empty + 8 * stage, fault == kWrongEmptyParity ? parity : parity ^ 1);
      if (warp == 4 && ptx::elect_one()) {
        const uint32_t bytes = fault == kTooFewBytes    ? kTileBytes - 16
                               : fault == kTooManyBytes ? kTileBytes + 16
                                                        : kTileBytes;
        ptx::mbarrier_arrive_expect_tx(full + 8 * stage, bytes);
        ptx::tma_load_3d(b_tiles + stage * kTileBytes, &b_map, full + 8 * stage, step * kTile, column0, 0);
      }
      const int chunk = p % 8;
      const bool inside = step * kTile + chunk * 8 < depth;
      for (int r = p / 8; r < kTile; r += 16) {
        const bool valid = inside && row0 + r < rows;
        const __nv_bfloat16* source = valid ? a + static_cast<int64_t>(row0 + r) * depth + step * kTile + chunk * 8 : a;
        const uint32_t offset = fault == kWrongSwizzle ? r * 128 + chunk * 16 : swizzled_chunk(r, chunk);
        ptx::cp_async_16(a_tiles + stage * kTileBytes + offset, source, valid ? 16 : 0);
      }
      ptx::cp_async_mbarrier_arrive_noinc(full + 8 * stage);
      if (fault == kTooManyArrivals && p == 0) ptx::mbarrier_arrive(full + 8 * stage);
      advance();
    }
    if (fault != kExitsWithCopies) ptx::cp_async_wait_all();
  } else {
    ptx::setmaxnreg_inc<240>();
    float d[kTile / 2];
    int previous = -1;
    const auto release = [&](int s) {
      if (lane == 0 && (fault != kOneWarpReleases || warp == 0)) ptx::mbarrier_arrive(empty + 8 * s);
    };
    for (int step = 0; step < num_steps; ++step) {
      ptx::mbarrier_wait(full + 8 * stage, fault == kWrongFullParity ? parity ^ 1 : parity);
      if (fault != kNoProxyFence) ptx::fence_proxy_async();
      const uint64_t desc_a = ptx::wgmma_descriptor(a_tiles + stage * kTileBytes, 16, 1024, ptx::Swizzle::k128B);
      const uint64_t desc_b = ptx::wgmma_descriptor(b_tiles + stage * kTileBytes, 16, 1024, ptx::Swizzle::k128B);
      ptx::wgmma_keep(d);
      if (fault != kNoWgmmaFence) ptx::wgmma_fence();
      for (int k = 0; k < 4; ++k) {
        ptx::wgmma_m64k16<__nv_bfloat16, kTile>(d, desc_a + 2 * k, desc_b + 2 * k, step + k > 0);
      }
      ptx::wgmma_commit_group();
      if (fault == kTouchedInFlight) d[0] += 1;
      if (fault == kReleasedTooEarly) release(stage);
      ptx::wgmma_wait_group<1>();
      if (fault != kReleasedTooEarly && previous >= 0) release(previous);
      previous = stage;
      advance();
    }
    if (fault != kReadBeforeWait) ptx::wgmma_wait_group<0>();
    ptx::wgmma_keep(d);
    // 16 rows of a warp: row g and g + 8, columns 8j + 2q.
    for (int j = 0; j < kTile / 8; ++j) {
      for (int h = 0; h < 2; ++h) {
        const int r = warp * 16 + lane / 4 + 8 * h;
        unsigned char* place = raw + (out_tile - a_tiles) + swizzled_chunk(r, j) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(place) = pack2<__nv_bfloat16>(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
      }
    }
    if (fault == kReadBeforeWait) ptx::wgmma_wait_group<0>();
    if (fault != kNoStoreFence) ptx::fence_proxy_async();
    ptx::bar_sync(1, 128);
    if (warp == 0 && ptx::elect_one()) {
      ptx::tma_store_3d(&out_map, out_tile, column0, row0, 0);
      ptx::bulk_commit_group();
      if (fault != kStoreNotAwaited) ptx::bulk_wait_group_read<0>();
    }
  }
#endif
}

}  // namespace

extern "C" cudaError_t hopper_gemm(__nv_bfloat16* a, __nv_bfloat16* b, __nv_bfloat16* out, int64_t rows,
                                   int64_t columns, int64_t depth, int64_t fault) {
  CUtensorMap b_map;
  CUtensorMap out_map;
  const TensorMapSource b_source{b, DType::kBFloat16, depth, columns, 1, depth, columns * depth};
  const TensorMapSource out_source{out, DType::kBFloat16, columns, rows, 1, columns, rows * columns};
  if (const cudaError_t error = make_tensor_map(&b_map, b_source, kTile, kTile)) return error;
  if (const cudaError_t error = make_tensor_map(&out_map, out_source, kTile, kTile)) return error;
  const dim3 grid((rows + kTile - 1) / kTile, (columns + kTile - 1) / kTile);
  return launch<gemm_kernel>({grid, dim3(384), kSmemBytes}, b_map, out_map, static_cast<const __nv_bfloat16*>(a),
                             static_cast<int>(rows), static_cast<int>(depth), static_cast<int>(fault));
}
