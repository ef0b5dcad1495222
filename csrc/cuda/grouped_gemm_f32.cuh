// Grouped GEMM in full float32, on the CUDA cores.
//
// A warp covers 32 rows times 64 weight rows, a thread 8 x 8 of them: rows ty, ty + 4, ..., weight rows tx, tx + 8, ...
// with (ty, tx) its place among 4 x 8 lanes. So the lanes of a load read neighbouring rows of the tile, which the
// swizzle spreads over all banks, and each value fetched from shared memory takes part in eight multiplications.
// Every sum runs over K in order, one fused multiply-add after the other, whatever the tile.
#pragma once

#include "grouped_gemm_tiled.cuh"

namespace moekernels {

template <int kTileM_>
class FmaCompute {
 public:
  using Element = float;
  static constexpr int kTileM = kTileM_;
  static constexpr int kWarpsM = kTileM / 32;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocksPerSm = kTileM == 128 ? 2 : 3;  // 128 or 168 registers for each thread

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) sums_[i][j] = 0.0f;
    }
  }

  // Two elements of K at a time and no deeper unrolling: more would not fit the registers.
  template <class LoadNext>
  __device__ __forceinline__ void multiply(uint32_t rows_tile, uint32_t weights_tile, LoadNext&& load_next) {
    load_next();
    const uint32_t even_rows = tile_address(rows_tile, warp_m() * 32 + ty());
    const uint32_t odd_rows = tile_address(rows_tile, warp_m() * 32 + ty() + 4);
    const uint32_t weight_rows = tile_address(weights_tile, warp_n() * 64 + tx());
#pragma unroll 2
    for (uint32_t byte = 0; byte < kTileRowBytes; byte += 8) {
      float2 rows[kSums];
#pragma unroll
      for (int i = 0; i < kSums; i += 2) {
        rows[i] = ptx::ld_shared_v2((even_rows ^ byte) + 4 * i * kTileRowBytes);
        rows[i + 1] = ptx::ld_shared_v2((odd_rows ^ byte) + 4 * i * kTileRowBytes);
      }
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        const float2 weight = ptx::ld_shared_v2((weight_rows ^ byte) + 8 * j * kTileRowBytes);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums_[i][j] = fmaf(rows[i].y, weight.y, fmaf(rows[i].x, weight.x, sums_[i][j]));
        }
      }
    }
  }

  template <int kPass>
  __device__ __forceinline__ void store(float* slab) const {
    constexpr int kRowsPerPass = kSlabRows / kWarpsM;
    constexpr int kSumsPerPass = kRowsPerPass / 4;
    float* const corner = slab + (warp_m() * kRowsPerPass + ty()) * kSlabPitch + warp_n() * 64 + tx();
#pragma unroll
    for (int i = 0; i < kSumsPerPass; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) corner[4 * i * kSlabPitch + 8 * j] = sums_[kPass * kSumsPerPass + i][j];
    }
  }

 private:
  static constexpr int kSums = 8;  // along each side

  static __device__ __forceinline__ int ty() { return static_cast<int>(threadIdx.x) % 32 / 8; }
  static __device__ __forceinline__ int tx() { return static_cast<int>(threadIdx.x) % 8; }
  static __device__ __forceinline__ int warp_m() { return static_cast<int>(threadIdx.x) / 32 / kWarpsN; }
  static __device__ __forceinline__ int warp_n() { return static_cast<int>(threadIdx.x) / 32 % kWarpsN; }

  float sums_[kSums][kSums];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::Compute::kBlocksPerSm)
    grouped_gemm_f32_kernel(GroupedGemmParams params, int group_m) {
  MOEKERNELS_DYNAMIC_SMEM(smem);
  run_tiled_gemm<Traits>(params, group_m, smem);
}

}  // namespace moekernels
