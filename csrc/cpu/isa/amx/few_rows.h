// A group of 16 weights by all of the task's few rows at once. The weights, which come from memory, are read in as many
// uninterrupted streams as a tile has rows.
#pragma once

#include "cpu/isa/amx/tile.h"
#include "cpu/isa/parts.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kAmxFewRowGroups = 6;  // groups of rows: two registers of eight hold the operands

// Tiles that are fetched: of the weights themselves, as the processor's own prefetching falls behind when many rows are
// read too; and the first ones of the next weights, for memory to have something to do until they are multiplied.
constexpr int64_t kAmxTilesAhead = 3, kAmxTilesOfNext = 8;

// Into the first-level cache.
MOEKERNELS_INLINE void fetch_tile(const AmxLeft& left, int64_t tile) {
  const BFloat16* first = left.data + tile * left.tile_stride;
  for (int64_t row = 0; row < kAmxRows; ++row) {
    _mm_prefetch(reinterpret_cast<const char*>(first + row * left.row_stride), _MM_HINT_T0);
  }
}

// sums[r] (+)= left * right[r] over `tiles` tiles of K, where right[r] begins at right + r * right_stride; `next` are
// the weights that are read after these, if any.
template <int kRights>
void multiply_few_rows(const AmxLeft& left, const BFloat16* right, int64_t right_stride, int64_t tiles, float* sums,
                       bool add, const AmxLeft& next) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  const AmxLeft weights = left, ahead = next;
  const int64_t row_stride = weights.row_stride * int64_t(sizeof(BFloat16));
  const int64_t fetch_from = ahead.data == nullptr ? tiles : tiles - min(kAmxTilesOfNext, tiles);
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
  for (int64_t i = 0; i < tiles; ++i, right += kAmxElements) {
    _tile_loadd(6, weights.data + i * weights.tile_stride, row_stride);
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
    if (i < fetch_from) {
      fetch_tile(weights, i + kAmxTilesAhead);
    } else {
      fetch_tile(ahead, i - fetch_from);
    }
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
                                         const AmxLeft& next) {
  constexpr decltype(&multiply_few_rows<1>) kOf[kAmxFewRowGroups] = {multiply_few_rows<1>, multiply_few_rows<2>,
                                                                     multiply_few_rows<3>, multiply_few_rows<4>,
                                                                     multiply_few_rows<5>, multiply_few_rows<6>};
  kOf[rights - 1](left, right, right_stride, tiles, sums, add, next);
}

}  // namespace
}  // namespace moekernels::cpu
