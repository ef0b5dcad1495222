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

// What a tile fetches while it multiplies: weights that are needed some panels later, from memory, and those of the
// next panel, which mostly are in the second-level cache by then. Hardware prefetchers stop at the end of a page, which
// here is every weight row or two; and a processor drops fetches while too many are under way, so that weights are
// asked for twice. Memory is fetched into the second level: the first one has too few outstanding misses to keep a
// memory channel busy.
enum class Prefetch { kNone, kFar, kNear, kBoth };

template <class Dot>
struct TileOperands {
  const typename Dot::Packed* rows;               // [steps][tile rows][Dot::kStep]
  const typename Dot::Weight* weight[kTileCols];  // each [n]
  const typename Dot::Weight* far[kTileCols];     // each [n]
  const typename Dot::Weight* near[kTileCols];    // each [n]
  int64_t n;                                      // elements of K
  float* sums;                                    // [tile rows][sums_stride]
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

// Not inlined: it has no register to spare for what surrounds it.
template <class Dot, int kRows, Prefetch kPrefetch>
__attribute__((noinline)) void multiply_tile(const TileOperands<Dot>& t) {
  constexpr bool kFar = kPrefetch == Prefetch::kFar || kPrefetch == Prefetch::kBoth;
  constexpr bool kNear = kPrefetch == Prefetch::kNear || kPrefetch == Prefetch::kBoth;
  VecF sums[kRows][kTileCols];
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MOEKERNELS_UNROLL
    for (int c = 0; c < kTileCols; ++c) sums[r][c] = VecF{};
  }
  const typename Dot::Packed* rows = t.rows;
  int64_t k = 0;
  for (; k + Dot::kStep <= t.n; k += Dot::kStep, rows += kRows * Dot::kStep) {
    MOEKERNELS_UNROLL
    for (int c = 0; c < kTileCols; ++c) {
      if constexpr (kFar) __builtin_prefetch(t.far[c] + k, 0, 2);
      if constexpr (kNear) __builtin_prefetch(t.near[c] + k, 0, 3);
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

template <class Dot, Prefetch kPrefetch, int kRows = Dot::kTileRows>
MOEKERNELS_INLINE void multiply_tile(int64_t rows, const TileOperands<Dot>& t) {
  if (rows == kRows) return multiply_tile<Dot, kRows, kPrefetch>(t);
  if constexpr (kRows > 1) multiply_tile<Dot, kPrefetch, kRows - 1>(rows, t);
}

}  // namespace
}  // namespace moekernels::cpu
