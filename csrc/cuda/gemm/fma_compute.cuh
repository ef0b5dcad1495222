// Multiplication in full float32, on the CUDA cores.
//
// A warp covers 32 rows times 64 weight rows, a thread 8 x 8 of them; (ty, tx) is its place among 4 x 8 lanes. K-major,
// these are rows ty, ty + 4, ... and weight rows tx, tx + 8, ...: the lanes of a load read neighbouring rows of the
// tile, which the swizzle spreads over all banks. M- or N-major they come in fours, which one load fetches: rows 4 ty
// and following, the next four 16 rows on; weight rows 4 tx and following, the next four 32 rows on. Either way each
// value fetched from shared memory takes part in eight multiplications. Every sum runs over K in order, one fused
// multiply-add after the other, whatever the tile.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/gemm/mainloop.cuh"

namespace moekernels {

template <int kTileM_, Major kRowsMajor_ = Major::kK, Major kWeightsMajor_ = Major::kK>
class FmaCompute {
 public:
  using Element = float;
  static constexpr int kTileM = kTileM_;
  static constexpr Major kRowsMajor = kRowsMajor_;
  static constexpr Major kWeightsMajor = kWeightsMajor_;
  static constexpr int kWarpsM = kTileM / 32;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocksPerSm = kTileM == 128 ? 2 : 3;  // 128 or 168 registers for each thread
  static_assert(kRowsMajor == Major::kK || kWeightsMajor == Major::kMN);

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
    constexpr int kUnroll = kRowsMajor == Major::kMN ? 1 : 2;
#pragma unroll kUnroll
    for (uint32_t byte = 0; byte < kTileRowBytes; byte += 8) {
      const auto k = static_cast<int>(byte / 4);
      if constexpr (kRowsMajor == Major::kMN) {
#pragma unroll
        for (int depth = k; depth < k + 2; ++depth) {
          float rows[kSums];
          fetch_four<kTileM>(rows, rows_tile, depth, warp_m() * 32 + 4 * ty());
          fetch_four<kTileM>(rows + 4, rows_tile, depth, warp_m() * 32 + 4 * ty() + 16);
          multiply_mn_major(weights_tile, depth, [&](int i) { return rows[i]; });
        }
      } else {
        float2 rows[kSums];
#pragma unroll
        for (int i = 0; i < kSums; i += 2) {
          rows[i] = ptx::ld_shared_v2((even_rows ^ byte) + 4 * i * kTileRowBytes);
          rows[i + 1] = ptx::ld_shared_v2((odd_rows ^ byte) + 4 * i * kTileRowBytes);
        }
        if constexpr (kWeightsMajor == Major::kMN) {
          multiply_mn_major(weights_tile, k, [&](int i) { return rows[i].x; });
          multiply_mn_major(weights_tile, k + 1, [&](int i) { return rows[i].y; });
        } else {
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
    }
  }

  template <int kPass>
  __device__ __forceinline__ void store(float* slab) const {
    constexpr int kRowsPerPass = kSlabRows / kWarpsM;
    constexpr int kSumsPerPass = kRowsPerPass / 4;
#pragma unroll
    for (int i = 0; i < kSumsPerPass; ++i) {
      const float (&sums)[kSums] = sums_[kPass * kSumsPerPass + i];
      float* const row = slab + (warp_m() * kRowsPerPass + slab_row(i)) * kSlabPitch + warp_n() * 64;
      if constexpr (kWeightsMajor == Major::kK) {
#pragma unroll
        for (int j = 0; j < kSums; ++j) row[tx() + 8 * j] = sums[j];
      } else {
#pragma unroll
        for (int j = 0; j < kSums; j += 4) {
          *reinterpret_cast<float4*>(row + 4 * tx() + 8 * j) =
              make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
        }
      }
    }
  }

 private:
  static constexpr int kSums = 8;  // along each side

  static __device__ __forceinline__ int ty() { return static_cast<int>(threadIdx.x) % 32 / 8; }
  static __device__ __forceinline__ int tx() { return static_cast<int>(threadIdx.x) % 8; }
  static __device__ __forceinline__ int warp_m() { return static_cast<int>(threadIdx.x) / 32 / kWarpsN; }
  static __device__ __forceinline__ int warp_n() { return static_cast<int>(threadIdx.x) / 32 % kWarpsN; }

  // Where the i-th row of a pass lies among the warp's.
  static __device__ __forceinline__ int slab_row(int i) {
    return kRowsMajor == Major::kK ? ty() + 4 * i : 4 * ty() + i % 4 + i / 4 * 16;
  }

  // M- or N-major: four neighbours in row k.
  template <int kCols>
  static __device__ __forceinline__ void fetch_four(float* values, uint32_t tile, int k, int first) {
    const uint32_t row = MnMajorTile<float, kCols>::address(tile, k);
    const uint4 four = ptx::ld_shared_v4(row ^ static_cast<uint32_t>((first / 4) << 4));
    values[0] = __uint_as_float(four.x);
    values[1] = __uint_as_float(four.y);
    values[2] = __uint_as_float(four.z);
    values[3] = __uint_as_float(four.w);
  }

  // Row k of MN-major weights; row(i): element k of the i-th row.
  template <class Row>
  __device__ __forceinline__ void multiply_mn_major(uint32_t weights_tile, int k, Row&& row) {
#pragma unroll
    for (int first = 0; first < kSums; first += 4) {
      float weights[4];
      fetch_four<kTiledN>(weights, weights_tile, k, warp_n() * 64 + 4 * tx() + 8 * first);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums_[i][first + j] = fmaf(row(i), weights[j], sums_[i][first + j]);
      }
    }
  }

  float sums_[kSums][kSums];
};

}  // namespace moekernels
