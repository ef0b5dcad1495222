// The inner kernel of the grouped GEMM: a few packed rows times four rows of the weight.
//
// Both operands are K-major, so every output is a dot product of two contiguous vectors and nothing is transposed. One
// register accumulates each (row, column); its lanes are added up at the end of a chunk of K. How an output is summed
// thus depends on K alone, not on which rows and columns share its tile.
#pragma once

#include "cpu/isa/dot.h"

namespace moekernels::cpu {
namespace {

constexpr int kTileCols = 4;
constexpr int kTileRows = MOEKERNELS_VECTOR_BYTES == 64 ? 6 : MOEKERNELS_VECTOR_BYTES == 32 ? 3 : 2;

// What a tile fetches while it multiplies: nothing, weights of the next panel from memory, or weights of the next chunk
// from the second-level cache. Hardware prefetchers stop at the end of a page, which here is every weight row or two.
// Memory is fetched into the second level: the first one has too few outstanding misses to keep a memory channel busy.
enum class Prefetch { kNone, kToSecondLevel, kToFirstLevel };

template <class Dot>
struct TileOperands {
  const typename Dot::Packed* rows;                 // [steps][tile rows][Dot::kStep]
  const typename Dot::Weight* weight[kTileCols];    // each [n]
  const typename Dot::Weight* prefetch[kTileCols];  // each [n]
  int64_t n;                                        // elements of K
  float* sums;                                      // [tile rows][sums_stride]
  int64_t sums_stride;
  bool add;  // to sums, rather than replacing them
};

template <class Dot, int kRows>
MOEKERNELS_INLINE void tile_step(const typename Dot::Packed* rows,
                                 const typename Dot::Weight* const (&weight)[kTileCols], int64_t k,
                                 VecF (&sums)[kRows][kTileCols]) {
  MOEKERNELS_UNROLL
  for (int vector = 0; vector < Dot::kVectors; ++vector) {
    typename Dot::Operand a[kRows];
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) a[r] = Dot::packed(rows + r * Dot::kStep, vector);
    MOEKERNELS_UNROLL
    for (int c = 0; c < kTileCols; ++c) {
      const typename Dot::Operand b = Dot::weight(weight[c] + k, vector);
      MOEKERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][c] = Dot::multiply_add(a[r], b, sums[r][c]);
    }
  }
}

template <class Dot, int kRows, Prefetch kPrefetch>
void multiply_tile(const TileOperands<Dot>& t) {
  VecF sums[kRows][kTileCols];
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MOEKERNELS_UNROLL
    for (int c = 0; c < kTileCols; ++c) sums[r][c] = VecF{};
  }
  const typename Dot::Packed* rows = t.rows;
  int64_t k = 0;
  for (; k + Dot::kStep <= t.n; k += Dot::kStep, rows += kRows * Dot::kStep) {
    if constexpr (kPrefetch != Prefetch::kNone) {
      MOEKERNELS_UNROLL
      for (int c = 0; c < kTileCols; ++c) {
        __builtin_prefetch(t.prefetch[c] + k, 0, kPrefetch == Prefetch::kToFirstLevel ? 3 : 2);
      }
    }
    tile_step<Dot, kRows>(rows, t.weight, k, sums);
  }
  if (k < t.n) {
    typename Dot::Weight last[kTileCols][Dot::kStep] = {};
    const typename Dot::Weight* weight[kTileCols];
    for (int c = 0; c < kTileCols; ++c) {
      for (int64_t i = k; i < t.n; ++i) last[c][i - k] = t.weight[c][i];
      weight[c] = last[c];
    }
    tile_step<Dot, kRows>(rows, weight, 0, sums);
  }
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    reduce_4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], t.sums + r * t.sums_stride, t.add);
  }
}

template <class Dot, Prefetch kPrefetch>
MOEKERNELS_INLINE void multiply_tile(int64_t rows, const TileOperands<Dot>& t) {
  switch (rows) {
    case 1:
      return multiply_tile<Dot, 1, kPrefetch>(t);
    case 2:
      return multiply_tile<Dot, 2, kPrefetch>(t);
#if MOEKERNELS_VECTOR_BYTES >= 32
    case 3:
      return multiply_tile<Dot, 3, kPrefetch>(t);
#endif
#if MOEKERNELS_VECTOR_BYTES >= 64
    case 4:
      return multiply_tile<Dot, 4, kPrefetch>(t);
    case 5:
      return multiply_tile<Dot, 5, kPrefetch>(t);
    case 6:
      return multiply_tile<Dot, 6, kPrefetch>(t);
#endif
  }
}

}  // namespace
}  // namespace moekernels::cpu
