// The inner kernel of products by outer products: a few elements of a column of the left operand, each broadcast, times
// a few vectors of a row of the right one.
//
// The sums stay in registers for a whole chunk of K and no lanes are added up. How an output is summed depends on K
// alone, not on which rows and columns share its tile: over a chunk in order, then over the chunks.
#pragma once

#include "simd.h"

namespace moekernels::cpu {
namespace {

constexpr int kOuterRows = MOEKERNELS_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kOuterVectors = MOEKERNELS_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kOuterCols = kOuterVectors * kLanes;
constexpr int64_t kOuterChunk = 128;  // elements of K: a panel of the right operand stays in the first-level cache

struct OuterOperands {
  const float* left;  // element k of row r: left[r * left_stride + k * left_step]
  int64_t left_stride;
  int64_t left_step;
  const float* right;  // [n][vectors of the tile]
  int64_t n;           // elements of K
  float* sums;         // [tile rows][sums_stride]
  int64_t sums_stride;
  bool add;  // to sums, rather than replacing them
};

template <int kRows, int kVectors>
void multiply_outer(const OuterOperands& t) {
  VecF sums[kRows][kVectors];
  const float* left[kRows];
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    left[r] = t.left + r * t.left_stride;
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = VecF{};
  }
  const float* right = t.right;
  const int64_t step = t.left_step, end = t.n * step;
  for (int64_t k = 0; k != end; k += step, right += kVectors * kLanes) {
    VecF b[kVectors];
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) b[v] = load(right + v * kLanes);
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecF a = set1(left[r][k]);
      MOEKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(a, b[v], sums[r][v]);
    }
  }
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* target = t.sums + r * t.sums_stride + v * kLanes;
      store(target, t.add ? load(target) + sums[r][v] : sums[r][v]);
    }
  }
}

template <int kVectors, int kRows = kOuterRows>
MOEKERNELS_INLINE void multiply_outer_rows(int64_t rows, const OuterOperands& t) {
  if (rows == kRows) return multiply_outer<kRows, kVectors>(t);
  if constexpr (kRows > 1) multiply_outer_rows<kVectors, kRows - 1>(rows, t);
}

// At most kOuterRows rows times kOuterVectors vectors.
template <int kVectors = kOuterVectors>
MOEKERNELS_INLINE void multiply_outer(int64_t rows, int64_t vectors, const OuterOperands& t) {
  if (vectors == kVectors) return multiply_outer_rows<kVectors>(rows, t);
  if constexpr (kVectors > 1) multiply_outer<kVectors - 1>(rows, vectors, t);
}

}  // namespace
}  // namespace moekernels::cpu
