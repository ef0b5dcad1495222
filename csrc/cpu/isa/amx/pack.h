// Packed operands of multiply_tiles: groups of 16 rows (left) or columns (right), each a tile after the other along K,
// the last one filled up with zeros. What a group lacks of 16 rows or columns is left undefined; so are its sums.
#pragma once

#include "cpu/isa/amx/tile.h"
#include "cpu/isa/parts.h"
#include "cpu/isa/transpose.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kAmxMinCols = 64;   // of a task: two pairs of groups
constexpr int64_t kAmxMaxCols = 256;  // no task has more rows, no block more columns

// source(i), ..., for one block of transpose_block; rows from n on, and rows that are not there (null), are zero.
template <class T, class Source>
MOEKERNELS_INLINE void block_rows(const Source& source, int64_t begin, int64_t n,
                                  const T* (&rows)[kTransposedRows<T>]) {
  static const T zeros[kAmxMaxCols] = {};
  for (int64_t i = 0; i < kTransposedRows<T>; ++i) {
    const T* row = begin + i < n ? source(begin + i) : nullptr;
    rows[i] = row == nullptr ? zeros : row;
  }
}

class AmxPacked {
 public:
  explicit AmxPacked(void* memory) : packed_(static_cast<BFloat16*>(memory)) {}

  void resize(int64_t n) { tiles_ = ceil_div(n, kAmxDepth); }
  const BFloat16* at(int64_t group, int64_t tile) const { return packed_ + (group * tiles_ + tile) * kAmxElements; }

  // left: rows source(row)[0 .. n); null: zeros
  template <class Source>
  void pack_left(int64_t rows, int64_t n, const Source& source) {
    resize(n);
    for (int64_t row = 0; row < rows; ++row) {
      const BFloat16* from = source(row);
      BFloat16* to = target(row / kAmxRows, 0) + row % kAmxRows * kAmxDepth;
      for (int64_t k = 0; k < n; k += kAmxDepth, to += kAmxElements) store_word(to, words(from, k, n));
    }
  }

  // left, MN-major: source(k)[row] for k in [0, n)
  template <class Source>
  void pack_left_transposed(int64_t rows, int64_t n, const Source& source) {
    resize(n);
    const BFloat16* lines[kAmxDepth];
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      block_rows(source, tile * kAmxDepth, n, lines);
      for (int64_t row = 0; row < rows; row += kAmxRows) {
        transpose_block(lines, row, min(kAmxRows, rows - row), target(row / kAmxRows, tile), kAmxDepth);
      }
    }
  }

  // right, K-major: column c is source(c)[0 .. n); null: zeros
  template <class Source>
  void pack_right(int64_t cols, int64_t n, const Source& source) {
    resize(n);
    for (int64_t first = 0; first < cols; first += kAmxRows) {
      const BFloat16* rows[kAmxRows];
      for (int64_t c = 0; c < kAmxRows; ++c) rows[c] = first + c < cols ? source(first + c) : nullptr;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        VecU v[kAmxRows];
        MOEKERNELS_UNROLL
        for (int c = 0; c < kAmxRows; ++c) v[c] = words(rows[c], tile * kAmxDepth, n);
        transpose(v);
        BFloat16* to = target(first / kAmxRows, tile);
        MOEKERNELS_UNROLL
        for (int pair = 0; pair < kAmxRows; ++pair) store_word(to + pair * kAmxDepth, v[pair]);
      }
    }
  }

  // right, MN-major: column c is source(k)[c] for k in [0, n). Columns go by pairs of groups, in the order in which the
  // instructions leave them: `in_order` undoes it. The rows of the next tile, of which there are some up to `end`, are
  // fetched meanwhile: they lie too far apart for the processor to do that.
  template <class Source>
  void pack_right_transposed(int64_t cols, int64_t n, int64_t end, const Source& source) {
    resize(n);
    const BFloat16 *rows[kAmxDepth], *next[kAmxDepth];
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      block_rows(source, tile * kAmxDepth, n, rows);
      block_rows(source, (tile + 1) * kAmxDepth, end, next);
      for (int64_t pair = 0; pair < kAmxRows; ++pair) {
        BFloat16* low = target(0, tile) + pair * kAmxDepth;
        for (int64_t first = 0; first < cols; first += 2 * kAmxRows, low += 2 * tiles_ * kAmxElements) {
          __builtin_prefetch(next[2 * pair] + first);
          __builtin_prefetch(next[2 * pair + 1] + first);
          const __m512i even = (__m512i)words(rows[2 * pair], first, cols);
          const __m512i odd = (__m512i)words(rows[2 * pair + 1], first, cols);
          store_word(low, (VecU)_mm512_unpacklo_epi16(even, odd));
          store_word(low + tiles_ * kAmxElements, (VecU)_mm512_unpackhi_epi16(even, odd));
        }
      }
    }
  }

  // The sums of a row in two groups that pack_right_transposed made, in the order of the columns.
  static MOEKERNELS_INLINE void in_order(VecF& low, VecF& high) {
    const __m512d a = (__m512d)low, b = (__m512d)high;
    low = (VecF)_mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
    high = (VecF)_mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
  }

 private:
  BFloat16* target(int64_t group, int64_t tile) { return packed_ + (group * tiles_ + tile) * kAmxElements; }

  // Elements i .. i + 32 of a row of n; zeros past its end and where there is none.
  static MOEKERNELS_INLINE VecU words(const BFloat16* row, int64_t i, int64_t n) {
    if (row == nullptr) return VecU{};
    if (i + kAmxDepth <= n) return *reinterpret_cast<const VecUMemory*>(row + i);
    return (VecU)_mm512_maskz_loadu_epi16((1u << (n - i)) - 1, row + i);
  }
  static MOEKERNELS_INLINE void store_word(BFloat16* p, VecU v) { *reinterpret_cast<VecUMemory*>(p) = v; }

  BFloat16* packed_;
  int64_t tiles_ = 0;
};

}  // namespace
}  // namespace moekernels::cpu
