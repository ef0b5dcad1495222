// A group of 16 weights by all of the task's few rows at once. The weights, which come from memory, are read in as many
// uninterrupted streams as a tile has rows.
#pragma once

#include "amx_tile.h"
#include "parts.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kAmxFewRowGroups = 6;  // groups of rows: two registers of eight hold the operands

// The weights that are read next. While the last tiles are multiplied their first lines are fetched, so that memory has
// something to do until they are multiplied themselves.
struct AmxNext {
  static constexpr int64_t kTiles = 8;

  const BFloat16* weight = nullptr;  // or nothing
  int64_t row_stride = 0;            // elements

  MOEKERNELS_INLINE void fetch(int64_t tile) const {
    for (int64_t row = 0; row < kAmxRows; ++row) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + row * row_stride + tile * kAmxDepth), _MM_HINT_T0);
    }
  }
};

// sums[r] (+)= left * right[r] over `tiles` tiles of K, where right[r] begins at right + r * right_stride.
template <int kRights>
void multiply_few_rows(const AmxLeft& left, const BFloat16* right, int64_t right_stride, int64_t tiles, float* sums,
                       bool add, const AmxNext& next) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  const AmxNext ahead = next;
  const BFloat16* weight = left.data;
  const int64_t tile_stride = left.tile_stride, row_stride = left.row_stride * int64_t(sizeof(BFloat16));
  const int64_t fetch_from = ahead.weight == nullptr ? tiles : tiles - smaller(AmxNext::kTiles, tiles);
  if (add) {
    _tile_loadd(0, sums, kAmxStride);
    if constexpr (kRights > 1) _tile_loadd(1, sums + kAmxSums, kAmxStride);
    if constexpr (kRights > 2) _tile_loadd(2, sums + 2 * kAmxSums, kAmxStride);
    if constexpr (kRights > 3) _tile_loadd(3, sums + 3 * kAmxSums, kAmxStride);
    if constexpr (kRights > 4) _tile_loadd(4, sums + 4 * kAmxSums, kAmxStride);
    if constexpr (kRights > 5) _tile_loadd(5, sums + 5 * kAmxSums, kAmxStride);
  } else {
    _tile_zero(0);
    if constexpr (kRights > 1) _tile_zero(1);
    if constexpr (kRights > 2) _tile_zero(2);
    if constexpr (kRights > 3) _tile_zero(3);
    if constexpr (kRights > 4) _tile_zero(4);
    if constexpr (kRights > 5) _tile_zero(5);
  }
  for (int64_t i = 0; i < tiles; ++i, weight += tile_stride, right += kAmxElements) {
    _tile_loadd(6, weight, row_stride);
    _tile_loadd(7, right, kAmxStride);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kRights > 1) {
      _tile_loadd(7, right + right_stride, kAmxStride);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (kRights > 2) {
      _tile_loadd(7, right + 2 * right_stride, kAmxStride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kRights > 3) {
      _tile_loadd(7, right + 3 * right_stride, kAmxStride);
      _tile_dpbf16ps(3, 6, 7);
    }
    if constexpr (kRights > 4) {
      _tile_loadd(7, right + 4 * right_stride, kAmxStride);
      _tile_dpbf16ps(4, 6, 7);
    }
    if constexpr (kRights > 5) {
      _tile_loadd(7, right + 5 * right_stride, kAmxStride);
      _tile_dpbf16ps(5, 6, 7);
    }
    if (i >= fetch_from) ahead.fetch(i - fetch_from);
  }
  _tile_stored(0, sums, kAmxStride);
  if constexpr (kRights > 1) _tile_stored(1, sums + kAmxSums, kAmxStride);
  if constexpr (kRights > 2) _tile_stored(2, sums + 2 * kAmxSums, kAmxStride);
  if constexpr (kRights > 3) _tile_stored(3, sums + 3 * kAmxSums, kAmxStride);
  if constexpr (kRights > 4) _tile_stored(4, sums + 4 * kAmxSums, kAmxStride);
  if constexpr (kRights > 5) _tile_stored(5, sums + 5 * kAmxSums, kAmxStride);
}

// For 1 to kAmxFewRowGroups groups of rows.
MOEKERNELS_INLINE void multiply_few_rows(int64_t rights, const AmxLeft& left, const BFloat16* right,
                                         int64_t right_stride, int64_t tiles, float* sums, bool add,
                                         const AmxNext& next) {
  constexpr decltype(&multiply_few_rows<1>) kOf[kAmxFewRowGroups] = {multiply_few_rows<1>, multiply_few_rows<2>,
                                                                     multiply_few_rows<3>, multiply_few_rows<4>,
                                                                     multiply_few_rows<5>, multiply_few_rows<6>};
  kOf[rights - 1](left, right, right_stride, tiles, sums, add, next);
}

}  // namespace
}  // namespace moekernels::cpu
