// Tiles whose rows lie along K: MN-major operands of the sm_80 and float32 GEMMs, and their way from
// global to shared memory.
//
// A stage is as deep as one of tile_loader.cuh (64 bytes of elements) and has that many rows of kCols columns. Chunk c
// of row k lies at kPitch k + 16 (c ^ s), where s is
//   16-bit elements: k % 8, as ldmatrix.trans reads one chunk of eight consecutive rows;
//   32-bit elements: 2 (k % 4), as lanes read single words of four rows and eight columns. Whole rows of a few chunks
//   are free of bank conflicts under any permutation.
// A thread keeps one chunk index and takes every kRowStep-th row, so that neighbours read a row in order.
#pragma once

#include "cuda/gemm/tile_loader.cuh"

namespace moekernels {

// How an operand lies in its tile: K innermost, or its rows (M) or columns (N).
enum class Major { kK, kMN };

template <class T, int kCols>
struct MnMajorTile {
  static constexpr int kRows = kTileRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kPitch = kCols * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kPitch / 16;
  static_assert((kChunks & (kChunks - 1)) == 0);

  // Chunk 0 of row `k` of the tile at `tile`, a multiple of kPitch. Chunk c is at this address ^ 16 c.
  static __device__ __forceinline__ uint32_t address(uint32_t tile, int k) {
    const int swizzle = sizeof(T) == 2 ? k % 8 : k % 4 * 2;
    return tile + static_cast<uint32_t>(k * kPitch + (swizzle << 4));
  }
};

// kAligned: as in TileLoader.
template <class T, int kCols, int kThreads, bool kAligned>
class MnMajorLoader {
  using Tile = MnMajorTile<T, kCols>;
  static constexpr int kVec = Vec16<T>::kSize;

 public:
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static constexpr int kRows = Tile::kRows / kRowStep;  // of a thread
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowStep == 0);
  static_assert(kRowStep % (sizeof(T) == 2 ? 8 : 4) == 0, "one swizzle for all rows of a thread");

  // Columns [first_col, first_col + kCols) of a matrix that has `width` of them; zeros past the last. `readable`: any
  // address that is a multiple of 16.
  __device__ __forceinline__ MnMajorLoader(const void* readable, int32_t first_col, int32_t width)
      : readable_(readable), col_(first_col + chunk() * kVec), count_(min(max(width - col_, 0), kVec)) {}

  // Row i of this thread in the tile.
  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x) / Tile::kChunks + i * kRowStep;
  }

  // row_pointer(i): the start of the source row that belongs to row(i), or null for a row of zeros.
  template <class RowPointer>
  __device__ __forceinline__ void load(uint32_t tile, RowPointer&& row_pointer) const {
    const uint32_t target = Tile::address(tile, row(0)) ^ static_cast<uint32_t>(chunk() << 4);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* const source = row_pointer(i);
      const int count = source == nullptr ? 0 : count_;
      if constexpr (kAligned) {
        const void* const from = count > 0 ? source + col_ : readable_;
        ptx::cp_async_16(target + i * kRowStep * Tile::kPitch, from, count * static_cast<uint32_t>(sizeof(T)));
      } else {
        Vec16<T> vec;
#pragma unroll
        for (int j = 0; j < kVec; ++j) vec.values[j] = j < count ? source[col_ + j] : from_float<T>(0.0f);
        ptx::st_shared_v4(target + i * kRowStep * Tile::kPitch, *reinterpret_cast<const uint4*>(&vec));
      }
    }
  }

 private:
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }

  const void* readable_;
  int32_t col_;    // of this thread's chunk
  int32_t count_;  // elements of it that exist
};

}  // namespace moekernels
