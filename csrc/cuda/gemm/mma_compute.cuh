// Multiplication by mma.sync: bf16, fp16, and float32 rounded to tf32.
//
// Four warps as 2 x 2, each with kTileM / 2 rows times 64 weight rows: a warp of the 128-row tile reads 8 KB of shared
// memory for every 64 mma, half of what the tensor cores leave time for. 128 accumulators per thread, two blocks per
// multiprocessor: one's epilogue runs under the other's main loop.
//
// Each operand may be K-major (tile_loader.cuh) or MN-major (mn_major_loader.cuh): ldmatrix, plain or transposing,
// makes the same fragments of both. It cannot transpose 32-bit elements: those are read word by word.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/gemm/mainloop.cuh"

namespace moekernels {

template <class T, int kTileM_, Major kRowsMajor_ = Major::kK, Major kWeightsMajor_ = Major::kK>
class MmaCompute {
 public:
  using Element = T;
  static constexpr int kTileM = kTileM_;
  static constexpr Major kRowsMajor = kRowsMajor_;
  static constexpr Major kWeightsMajor = kWeightsMajor_;
  static constexpr int kWarpsM = 2;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocksPerSm = 2;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMmasM; ++i) {
#pragma unroll
      for (int j = 0; j < kMmasN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0.0f;
      }
    }
  }

  // Two steps of two chunks each: 16 elements of 16 bits or 8 of 32. The second's fragments are fetched before the
  // first is multiplied, and the copies of a later stage are issued in between, so that the tensor cores start at once.
  template <class LoadNext>
  __device__ __forceinline__ void multiply(uint32_t rows_tile, uint32_t weights_tile, LoadNext&& load_next) {
    uint32_t rows[2][kMmasM][4];
    uint32_t weights[2][kMmasN / 2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      fetch_rows(rows[step], rows_tile, step);
      fetch_weights(weights[step], weights_tile, step);
    }
    multiply_step(rows[0], weights[0]);
    load_next();
    multiply_step(rows[1], weights[1]);
  }

  template <int kPass>
  __device__ __forceinline__ void store(float* slab) const {
    constexpr int kRowsPerPass = kSlabRows / kWarpsM;
    constexpr int kMmasPerPass = kRowsPerPass / 16;
    const int group = lane() / 4;
    const int quad = lane() % 4;
    float* const corner = slab + (warp_m() * kRowsPerPass + group) * kSlabPitch + warp_n() * kWarpCols + quad * 2;
#pragma unroll
    for (int i = 0; i < kMmasPerPass; ++i) {
#pragma unroll
      for (int j = 0; j < kMmasN; ++j) {
        const float (&sums)[4] = sums_[kPass * kMmasPerPass + i][j];
        float* const target = corner + i * 16 * kSlabPitch + j * 8;
        *reinterpret_cast<float2*>(target) = make_float2(sums[0], sums[1]);
        *reinterpret_cast<float2*>(target + 8 * kSlabPitch) = make_float2(sums[2], sums[3]);
      }
    }
  }

 private:
  static constexpr int kWarpRows = kTileM / kWarpsM;
  static constexpr int kWarpCols = kTiledN / kWarpsN;
  static constexpr int kMmasM = kWarpRows / 16;
  static constexpr int kMmasN = kWarpCols / 8;
  using RowsByDepth = MnMajorTile<T, kTileM>;
  using WeightsByDepth = MnMajorTile<T, kTiledN>;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp_m() { return static_cast<int>(threadIdx.x) / 32 / kWarpsN; }
  static __device__ __forceinline__ int warp_n() { return static_cast<int>(threadIdx.x) / 32 % kWarpsN; }

  // The fragments of step 0 or 1 of a stage. K-major, these are two chunks of each row; for 32-bit elements a chunk is
  // four of them and ldmatrix, which moves 32 bits to each lane, makes the fragments of m16n8k8 in the same way.
  static __device__ __forceinline__ void fetch_rows(uint32_t (&rows)[kMmasM][4], uint32_t tile, int step) {
    if constexpr (kRowsMajor == Major::kK) {
      const int row = warp_m() * kWarpRows + lane() % 16;
      const uint32_t address = tile_address(tile, row) ^ static_cast<uint32_t>((2 * step + lane() / 16) << 4);
#pragma unroll
      for (int i = 0; i < kMmasM; ++i) ptx::ldmatrix_x4(rows[i], address + 16 * i * kTileRowBytes);
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane() % 8 + lane() / 16 * 8;
      const int chunk = warp_m() * kWarpRows / 8 + lane() / 8 % 2;
      const uint32_t address = RowsByDepth::address(tile, k) ^ static_cast<uint32_t>(chunk << 4);
#pragma unroll
      for (int i = 0; i < kMmasM; ++i) ptx::ldmatrix_x4_trans(rows[i], address ^ static_cast<uint32_t>(2 * i << 4));
    } else {
      const uint32_t address = word_address<RowsByDepth>(tile, step, warp_m() * kWarpRows);
#pragma unroll
      for (int i = 0; i < kMmasM; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t column = address ^ static_cast<uint32_t>((4 * i + c % 2 * 2) << 4);
          rows[i][c] = ptx::ld_shared_u32(column + c / 2 * 4 * RowsByDepth::kPitch);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMmasM; ++i) round_to_tf32(rows[i]);
  }

  static __device__ __forceinline__ void fetch_weights(uint32_t (&weights)[kMmasN / 2][4], uint32_t tile, int step) {
    if constexpr (kWeightsMajor == Major::kK) {
      const int row = warp_n() * kWarpCols + lane() % 8 + lane() / 16 * 8;
      const uint32_t address = tile_address(tile, row) ^ static_cast<uint32_t>((2 * step + lane() / 8 % 2) << 4);
#pragma unroll
      for (int j = 0; j < kMmasN / 2; ++j) ptx::ldmatrix_x4(weights[j], address + 16 * j * kTileRowBytes);
    } else if constexpr (sizeof(T) == 2) {
      const int k = step * 16 + lane() % 16;
      const int chunk = warp_n() * kWarpCols / 8 + lane() / 16;
      const uint32_t address = WeightsByDepth::address(tile, k) ^ static_cast<uint32_t>(chunk << 4);
#pragma unroll
      for (int j = 0; j < kMmasN / 2; ++j) {
        ptx::ldmatrix_x4_trans(weights[j], address ^ static_cast<uint32_t>(2 * j << 4));
      }
    } else {
      const uint32_t address = word_address<WeightsByDepth>(tile, step, warp_n() * kWarpCols);
#pragma unroll
      for (int j = 0; j < kMmasN / 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32_t column = address ^ static_cast<uint32_t>((4 * j + c / 2 * 2) << 4);
          weights[j][c] = ptx::ld_shared_u32(column + c % 2 * 4 * WeightsByDepth::kPitch);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kMmasN / 2; ++j) round_to_tf32(weights[j]);
  }

  // The word at K = 8 `step` + q and column `first` + g of a tile of 32-bit elements. Four steps of K further on
  // the swizzle is the same.
  template <class MnMajorTile>
  static __device__ __forceinline__ uint32_t word_address(uint32_t tile, int step, int first) {
    const int group = lane() / 4;
    const uint32_t row = MnMajorTile::address(tile, step * 8 + lane() % 4);
    return (row ^ static_cast<uint32_t>((first / 4 + group / 4) << 4)) + group % 4 * 4;
  }

  __device__ __forceinline__ void multiply_step(const uint32_t (&rows)[kMmasM][4],
                                                const uint32_t (&weights)[kMmasN / 2][4]) {
#pragma unroll
    for (int i = 0; i < kMmasM; ++i) {
#pragma unroll
      for (int j = 0; j < kMmasN; ++j)
        mma(sums_[i][j], rows[i], weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
    }
  }

  static __device__ __forceinline__ void round_to_tf32(uint32_t (&fragment)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = ptx::cvt_rna_tf32(__uint_as_float(fragment[i]));
    }
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (sizeof(T) == 4) {
      ptx::mma_m16n8k8_tf32(d, a, b0, b1);
    } else {
      ptx::mma_m16n8k16<T>(d, a, b0, b1);
    }
  }

  float sums_[kMmasM][kMmasN][4];
};

}  // namespace moekernels
