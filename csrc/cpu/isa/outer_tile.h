// The inner kernel of products by outer products: a few words of a column of the left operand, each broadcast, times a
// few vectors of a row of the right one. A word holds one element of K in float32, or two that follow each other in
// bfloat16.
//
// The sums stay in registers for a whole chunk of K and no lanes are added up. How an output is summed depends on K
// alone, not on which rows and columns share its tile: over a chunk in order, then over the chunks.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

constexpr int kOuterRows = MOEKERNELS_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kOuterVectors = MOEKERNELS_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kOuterCols = kOuterVectors * kLanes;
constexpr int64_t kOuterChunk = 128;  // words of K: a panel of the right operand stays in the first-level cache

struct OuterFloat32 {
  using Word = float;
  using Operand = VecF;
  static constexpr int kElements = 1;  // of K in a word

  static MOEKERNELS_INLINE Operand broadcast(Word x) { return set1(x); }
  static MOEKERNELS_INLINE Operand load_words(const Word* p) { return load(p); }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) { return fma(a, b, c); }
};

#if MOEKERNELS_NATIVE_BFLOAT16
struct OuterBFloat16 {
  using Word = uint32_t;
  using Operand = VecU;
  static constexpr int kElements = 2;

  static MOEKERNELS_INLINE Operand broadcast(Word x) { return VecU{} + x; }
  static MOEKERNELS_INLINE Operand load_words(const Word* p) { return *reinterpret_cast<const VecUMemory*>(p); }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Lines of some rows that are fetched into the second-level cache while a tile is multiplied, one or two at each step:
// many at once would fill the processor's buffers, and multiplying would wait for them.
struct OuterFetch {
  static constexpr int kLine = 64;

  const char* const* rows;
  int64_t line, end;  // of all lines, 2^shift of each row
  int64_t each;       // at a step
  int shift;

  MOEKERNELS_INLINE void step() {
    for (int64_t i = 0; i < each && line < end; ++i, ++line) {
      __builtin_prefetch(rows[line >> shift] + (line & ((1 << shift) - 1)) * kLine, 0, 2);
    }
  }
};

template <class Outer>
struct OuterOperands {
  const typename Outer::Word* left;  // word k of row r: left[r * left_stride + k * left_step]
  int64_t left_stride;
  int64_t left_step;
  const typename Outer::Word* right;  // [n][vectors of the tile]
  int64_t n;                          // words of K
  float* sums;                        // [tile rows][sums_stride]
  int64_t sums_stride;
  bool add;  // to sums, rather than replacing them
  OuterFetch fetch;
};

template <class Outer, int kRows, int kVectors>
void multiply_outer(const OuterOperands<Outer>& t) {
  VecF sums[kRows][kVectors];
  const typename Outer::Word* left[kRows];
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    left[r] = t.left + r * t.left_stride;
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = VecF{};
  }
  const typename Outer::Word* right = t.right;
  const int64_t step = t.left_step, end = t.n * step;
  OuterFetch fetch = t.fetch;
  for (int64_t k = 0; k != end; k += step, right += kVectors * kLanes) {
    if constexpr (MOEKERNELS_FETCH_FROM_MEMORY) fetch.step();
    typename Outer::Operand b[kVectors];
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) b[v] = Outer::load_words(right + v * kLanes);
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Outer::Operand a = Outer::broadcast(left[r][k]);
      MOEKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Outer::multiply_add(a, b[v], sums[r][v]);
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

template <class Outer, int kVectors, int kRows = kOuterRows>
MOEKERNELS_INLINE void multiply_outer_rows(int64_t rows, const OuterOperands<Outer>& t) {
  if (rows == kRows) return multiply_outer<Outer, kRows, kVectors>(t);
  if constexpr (kRows > 1) multiply_outer_rows<Outer, kVectors, kRows - 1>(rows, t);
}

// At most kOuterRows rows times kOuterVectors vectors.
template <class Outer, int kVectors = kOuterVectors>
MOEKERNELS_INLINE void multiply_outer_tile(int64_t rows, int64_t vectors, const OuterOperands<Outer>& t) {
  if (vectors == kVectors) return multiply_outer_rows<Outer, kVectors>(rows, t);
  if constexpr (kVectors > 1) multiply_outer_tile<Outer, kVectors - 1>(rows, vectors, t);
}

}  // namespace
}  // namespace moekernels::cpu
