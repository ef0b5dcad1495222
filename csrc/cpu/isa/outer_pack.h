// What multiply_outer reads: words of K of both operands, in scratch memory. Elements are widened, or joined in pairs.
#pragma once

#include "cpu/isa/outer_tile.h"
#include "cpu/isa/parts.h"

namespace moekernels::cpu {
namespace {

template <class T>
struct OuterOf {
  using Type = OuterFloat32;
};
#if MOEKERNELS_NATIVE_BFLOAT16
template <>
struct OuterOf<BFloat16> {
  using Type = OuterBFloat16;
};
#endif

// target[0 .. n) = source widened, then zeros up to a whole vector; null: zeros
template <class T>
MOEKERNELS_INLINE void widen_row(const T* source, int64_t n, float* target) {
  int64_t i = 0;
  if (source == nullptr) {
    for (; i < n; i += kLanes) store(target + i, VecF{});
    return;
  }
  for (; i + kLanes <= n; i += kLanes) store(target + i, load(source + i));
  if (i < n) store(target + i, load_n(source + i, n - i));
}

// The words of one K-major row of n elements.
template <class T>
MOEKERNELS_INLINE void pack_words(const T* source, int64_t n, float* target) {
  widen_row(source, n, target);
}

// One word of K of each of `count` MN-major rows, from the element row(k) on; row(n) is past the end.
template <class Row>
MOEKERNELS_INLINE void pack_word(const Row& row, int64_t k, int64_t, int64_t count, float* target) {
  widen_row(row(k), count, target);
}

#if MOEKERNELS_NATIVE_BFLOAT16
// Elements i .. i + kLanes of n as words; zeros from n on, and where there are none.
MOEKERNELS_INLINE VecU halves_at(const BFloat16* source, int64_t i, int64_t n) {
  if (source == nullptr) return VecU{};
  if (i + kLanes <= n) return __builtin_convertvector(*reinterpret_cast<const VecHMemory*>(source + i), VecU);
  return (VecU)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << (n - i)) - 1), source + i));
}

MOEKERNELS_INLINE void pack_words(const BFloat16* source, int64_t n, uint32_t* target) {
  int64_t i = 0;
  for (; source != nullptr && i + 2 * kLanes <= n; i += 2 * kLanes) {
    *reinterpret_cast<VecUMemory*>(target + i / 2) = *reinterpret_cast<const VecUMemory*>(source + i);
  }
  for (; i < n; i += 2 * kLanes) {
    const uint64_t left = source == nullptr ? 0 : min(n - i, 2 * kLanes);
    const __m512i words = _mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << left) - 1), source + i);
    *reinterpret_cast<VecUMemory*>(target + i / 2) = (VecU)words;
  }
}

// The words of 2 * kLanes columns, from the two rows that they are made of.
struct TwoVectorsOfWords {
  VecU first, second;
};
MOEKERNELS_INLINE TwoVectorsOfWords join_rows(const BFloat16* even, const BFloat16* odd) {
  const VecU lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const VecU first = lanes | (lanes + 2 * kLanes) << 16;  // odd has the places from 32 on
  const VecU second = first + (kLanes | kLanes << 16);
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  return {(VecU)_mm512_permutex2var_epi16(a, (__m512i)first, b),
          (VecU)_mm512_permutex2var_epi16(a, (__m512i)second, b)};
}

template <class Row>
MOEKERNELS_INLINE void pack_word(const Row& row, int64_t k, int64_t n, int64_t count, uint32_t* target) {
  const BFloat16* const even = row(2 * k);
  const BFloat16* const odd = 2 * k + 1 < n ? row(2 * k + 1) : nullptr;
  int64_t i = 0;
  if (even != nullptr && odd != nullptr) {
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      const TwoVectorsOfWords words = join_rows(even + i, odd + i);
      *reinterpret_cast<VecUMemory*>(target + i) = words.first;
      *reinterpret_cast<VecUMemory*>(target + i + kLanes) = words.second;
    }
  }
  for (; i < count; i += kLanes) {
    *reinterpret_cast<VecUMemory*>(target + i) = halves_at(even, i, count) | halves_at(odd, i, count) << 16;
  }
}
#endif

constexpr int64_t kOuterPadding = kLanes;  // words

// The left operand. Without the padding its lines were often a power of two apart, and would compete for the same few
// places of the first-level cache.
template <class Outer>
class OuterLeft {
 public:
  using Word = typename Outer::Word;

  explicit OuterLeft(void* memory) : packed_(static_cast<Word*>(memory)) {}

  // Rows source(row)[0 .. n); null: zeros.
  template <class Source>
  void pack(int64_t rows, int64_t n, const Source& source) {
    row_stride_ = round_up(ceil_div(n, Outer::kElements), kLanes) + kOuterPadding;
    step_ = 1;
    for (int64_t row = 0; row < rows; ++row) pack_words(source(row), n, packed_ + row * row_stride_);
  }

  // The same of an MN-major matrix: source(k)[row] for k in [0, n).
  template <class Source>
  void pack_transposed(int64_t rows, int64_t n, const Source& source) {
    row_stride_ = 1;
    step_ = round_up(rows, kLanes) + kOuterPadding;
    for (int64_t k = 0; k < ceil_div(n, Outer::kElements); ++k) pack_word(source, k, n, rows, packed_ + k * step_);
  }

  // As the left operand of a tile, from a row and an element of K, the first of a word, on.
  MOEKERNELS_INLINE void set(OuterOperands<Outer>& t, int64_t row, int64_t k) const {
    t.left = packed_ + row * row_stride_ + k / Outer::kElements * step_;
    t.left_stride = row_stride_;
    t.left_step = step_;
  }

 private:
  Word* packed_;
  int64_t row_stride_ = 0, step_ = 0;
};

}  // namespace
}  // namespace moekernels::cpu
