// Products of bfloat16 by tile registers (AMX): 16 rows x 32 elements of K x 16 columns in one instruction.
//
//   left   16 K-major rows: a weight as it lies in memory, or packed
//   right  16 pairs of K by 16 columns, always packed: elements 0 and 1 of column 0, of column 1, ..., then 2 and 3
//   sums   16 x 16 float32, row by row
//
// Packed operands are a tile of 1 KB after the other. An output adds up its products from the first element of K to the
// last, whatever is computed beside it. Operands and sums that are subnormal count as zero.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

constexpr int kAmxRows = 16;                                  // of left and sums; columns of right and sums
constexpr int kAmxDepth = 32;                                 // elements of K
constexpr int kAmxElements = kAmxRows * kAmxDepth;            // bfloat16 in a tile
constexpr int kAmxSums = kAmxRows * kAmxRows;                 // float32 in a tile
constexpr int64_t kAmxStride = kAmxDepth * sizeof(BFloat16);  // bytes of a row of a tile in scratch memory

// All eight tile registers at full size, for as long as the object lives. Then the thread has the configuration that it
// had before: other libraries (llama.cpp) configure each thread once and for all.
class AmxTiles {
 public:
  AmxTiles() {
    _tile_storeconfig(&before_);
    constexpr Config kWhole = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&kWhole);
  }
  ~AmxTiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];  // palette 0: no registers
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  };

  Config before_;
};

struct AmxLeft {
  const BFloat16* data;
  int64_t row_stride;        // elements
  int64_t tile_stride;       // elements to the next tile along K
  BFloat16* copy = nullptr;  // where multiply_tiles leaves the tiles, packed; or nowhere

  AmxLeft of_copy() const { return {copy, kAmxDepth, kAmxElements}; }
};

// Into the second-level cache.
MOEKERNELS_INLINE void fetch_line(const BFloat16* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// Four rows, a line of each of which multiply_tiles fetches with every tile; or none.
struct AmxFetch {
  static constexpr int64_t kRows = 4;

  const BFloat16* rows = nullptr;
  int64_t row_stride = 0;  // elements

  MOEKERNELS_INLINE void fetch(int64_t tile) const {
    if (rows == nullptr) return;
    for (int64_t row = 0; row < kRows; ++row) fetch_line(rows + row * row_stride + tile * kAmxDepth);
  }
};

// sums[l][r] (+)= left[l] * right[r] over `tiles` tiles of K. Sums of the same left lie side by side. Only two of each
// fetch what is next.
template <int kLefts, int kRights>
void multiply_tiles(const AmxLeft (&left)[2], const BFloat16* const (&right)[2], int64_t tiles, float* sums,
                    int64_t sums_stride, bool add, const AmxFetch& next = {}) {
  const AmxFetch ahead = next;
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  const AmxLeft a = left[0], b = left[1];
  const int64_t a_stride = a.row_stride * int64_t(sizeof(BFloat16)),
                b_stride = b.row_stride * int64_t(sizeof(BFloat16));
  const BFloat16 *const c = right[0], *const d = right[1];
  const auto sums_at = [=](int l, int r) { return sums + l * sums_stride + r * kAmxSums; };
  if (add) {
    _tile_loadd(0, sums_at(0, 0), kAmxStride);
    if constexpr (kRights > 1) _tile_loadd(1, sums_at(0, 1), kAmxStride);
    if constexpr (kLefts > 1) _tile_loadd(2, sums_at(1, 0), kAmxStride);
    if constexpr (kLefts > 1 && kRights > 1) _tile_loadd(3, sums_at(1, 1), kAmxStride);
  } else {
    _tile_zero(0);
    if constexpr (kRights > 1) _tile_zero(1);
    if constexpr (kLefts > 1) _tile_zero(2);
    if constexpr (kLefts > 1 && kRights > 1) _tile_zero(3);
  }
  for (int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(4, a.data + i * a.tile_stride, a_stride);
    if (a.copy != nullptr) _tile_stored(4, a.copy + i * kAmxElements, kAmxStride);
    _tile_loadd(6, c + i * kAmxElements, kAmxStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRights > 1) {
      _tile_loadd(7, d + i * kAmxElements, kAmxStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLefts > 1) {
      _tile_loadd(5, b.data + i * b.tile_stride, b_stride);
      if (b.copy != nullptr) _tile_stored(5, b.copy + i * kAmxElements, kAmxStride);
      _tile_dpbf16ps(2, 5, 6);
    }
    ahead.fetch(i);
    if constexpr (kLefts > 1 && kRights > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums_at(0, 0), kAmxStride);
  if constexpr (kRights > 1) _tile_stored(1, sums_at(0, 1), kAmxStride);
  if constexpr (kLefts > 1) _tile_stored(2, sums_at(1, 0), kAmxStride);
  if constexpr (kLefts > 1 && kRights > 1) _tile_stored(3, sums_at(1, 1), kAmxStride);
}

MOEKERNELS_INLINE void multiply_tiles(int64_t lefts, int64_t rights, const AmxLeft (&left)[2],
                                      const BFloat16* const (&right)[2], int64_t tiles, float* sums,
                                      int64_t sums_stride, bool add, const AmxFetch& next = {}) {
  if (lefts > 1) {
    if (rights > 1) return multiply_tiles<2, 2>(left, right, tiles, sums, sums_stride, add, next);
    return multiply_tiles<2, 1>(left, right, tiles, sums, sums_stride, add);
  }
  if (rights > 1) return multiply_tiles<1, 2>(left, right, tiles, sums, sums_stride, add);
  return multiply_tiles<1, 1>(left, right, tiles, sums, sums_stride, add);
}

}  // namespace
}  // namespace moekernels::cpu
