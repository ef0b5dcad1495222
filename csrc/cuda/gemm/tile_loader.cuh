// From rows in global memory to a tile in shared memory: 64 bytes of each row per stage, in chunks of 16 bytes.
//
// Chunk c of row r lies at 64 r + 16 (c ^ (r / 2 % 4)). Eight consecutive rows then cover all 32 banks, both where
// ldmatrix reads one chunk of each and where float4 loads do. A thread keeps one chunk index and takes every
// (kThreads / 4)-th row, so that four threads read 64 bytes in a row and one address serves all rows of a thread.
#pragma once

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

constexpr int kTileRowBytes = 64;
constexpr int kTileRowChunks = 4;

// Chunk 0 of a row of the tile at `tile`, a multiple of 64. Chunk c is at this address ^ 16 c; a row 8 n further on is
// 8 n * kTileRowBytes behind.
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int row) {
  return tile + static_cast<uint32_t>(row * kTileRowBytes + ((row >> 1 & 3) << 4));
}

// kAligned: every row starts at a multiple of 16 bytes, so that cp.async can fetch it. Otherwise elements go through
// registers one by one and are in place after the next barrier, which comes before anyone reads that stage.
// kMayLackRows: some rows may be zeros from nowhere.
template <class T, int kRows, int kThreads, bool kAligned, bool kMayLackRows>
class TileLoader {
 public:
  // `row_pointer(row)` is the start of the source row, or null for a row of zeros. `readable` is the start of any row.
  template <class RowPointer>
  __device__ __forceinline__ void start(const T* readable, RowPointer&& row_pointer) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const T* const source = row_pointer(first_row() + i * kRowStep);
      sources_[i] = kMayLackRows && source == nullptr ? readable : source;
      present_ |= static_cast<uint32_t>(source != nullptr) << i;
    }
  }

  // Elements [first_k, first_k + 64 bytes) of every row, zeros from element `in_features` on, to the tile at `tile`.
  __device__ __forceinline__ void load(uint32_t tile, int first_k, int in_features) const {
    const int first = first_k + chunk() * kVec;
    const uint32_t target = tile_address(tile, first_row()) ^ static_cast<uint32_t>(chunk() << 4);
    if (kAligned && first_k + kTileRowChunks * kVec <= in_features) {  // all but the last stage
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        ptx::cp_async_16(target + i * kRowStep * kTileRowBytes, sources_[i] + first, is_present(i) ? 16 : 0);
      }
      return;
    }
    const int left = min(max(in_features - first, 0), kVec);
    const int offset = left > 0 ? first : 0;  // an address is formed even where nothing is read
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int count = is_present(i) ? left : 0;
      if constexpr (kAligned) {
        ptx::cp_async_16(target + i * kRowStep * kTileRowBytes, sources_[i] + offset,
                         count * static_cast<uint32_t>(sizeof(T)));
      } else {
        Vec16<T> vec;
#pragma unroll
        for (int j = 0; j < kVec; ++j) vec.values[j] = j < count ? sources_[i][offset + j] : from_float<T>(0.0f);
        ptx::st_shared_v4(target + i * kRowStep * kTileRowBytes, *reinterpret_cast<const uint4*>(&vec));
      }
    }
  }

 private:
  static constexpr int kVec = Vec16<T>::kSize;
  static constexpr int kRowStep = kThreads / kTileRowChunks;
  static constexpr int kRowsPerThread = kRows / kRowStep;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0 && kRowsPerThread <= 32);

  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / kTileRowChunks; }
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % kTileRowChunks; }

  __device__ __forceinline__ bool is_present(int i) const { return !kMayLackRows || (present_ >> i & 1) != 0; }

  const T* sources_[kRowsPerThread];
  uint32_t present_ = 0;  // bit i: sources_[i] is a row, not a stand-in
};

}  // namespace moekernels
