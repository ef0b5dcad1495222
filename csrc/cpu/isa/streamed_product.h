// left [few rows, depth] @ right [depth, cols] in float32, where right is read from memory and each element of it once:
// a few of its rows at a time along their columns, which is how memory delivers them fastest. The sums lie in the
// first-level cache.
//
// They are summed as outer_product.h sums them, over a chunk of K in order and then over the chunks: to the same bits.
#pragma once

#include "cpu/isa/outer_product.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kStreamedRows = 8;                                  // more share what tiles pack once
constexpr int kStreamedTile = MOEKERNELS_VECTOR_BYTES == 64 ? 4 : 2;  // rows whose words are in registers
constexpr int kStreamedWords = 4;                                     // of K at a time
constexpr int64_t kStreamedSums = 4096;                               // a third of the first-level cache

// One word of each of n columns, at most a vector, from the rows of right that it is made of; null: zeros.
template <class T>
MOEKERNELS_INLINE VecF words_of_rows(const T* const* rows, int64_t col, int64_t n) {
  return n >= kLanes ? load(rows[0] + col) : load_n(rows[0] + col, n);
}
#if MOEKERNELS_NATIVE_BFLOAT16
MOEKERNELS_INLINE VecU words_of_rows(const BFloat16* const* rows, int64_t col, int64_t n) {
  return halves_at(rows[0], col, col + n) | halves_at(rows[1], col, col + n) << 16;
}
#endif

// sums[r][0 .. cols) += left[r][0 .. kCount words) @ those rows of right; `next` is what will be read after that.
template <class T, int kRows, int kCount>
void add_streamed(const OuterOperands<typename OuterOf<T>::Type>& t, const T* const* right, const T* const* next,
                  int64_t cols) {
  using Outer = typename OuterOf<T>::Type;
  if constexpr (kCount == kStreamedWords) {
    for (int k = 0; k < kCount * Outer::kElements; ++k) {
      if (right[k] == nullptr) __builtin_unreachable();
    }
  }
  typename Outer::Operand a[kRows][kCount];
  MOEKERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MOEKERNELS_UNROLL
    for (int k = 0; k < kCount; ++k) a[r][k] = Outer::broadcast(t.left[r * t.left_stride + k]);
  }
  for (int64_t col = 0; col < cols; col += kLanes) {
    typename Outer::Operand b[kCount];
    MOEKERNELS_UNROLL
    for (int k = 0; k < kCount; ++k) b[k] = words_of_rows(right + k * Outer::kElements, col, cols - col);
    MOEKERNELS_UNROLL
    for (int k = 0; k < kCount * Outer::kElements; ++k) __builtin_prefetch(next[k] + col);
    MOEKERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float* const target = t.sums + r * t.sums_stride + col;
      VecF sum = load(target);
      MOEKERNELS_UNROLL
      for (int k = 0; k < kCount; ++k) sum = Outer::multiply_add(a[r][k], b[k], sum);
      store(target, sum);
    }
  }
}

template <class T, int kCount, int kRows = kStreamedTile>
MOEKERNELS_INLINE void add_streamed_rows(int64_t rows, const OuterOperands<typename OuterOf<T>::Type>& t,
                                         const T* const* right, const T* const* next, int64_t cols) {
  if (rows == kRows) return add_streamed<T, kRows, kCount>(t, right, next, cols);
  if constexpr (kRows > 1) add_streamed_rows<T, kCount, kRows - 1>(rows, t, right, next, cols);
}

// As outer_product; rows <= kStreamedRows, and right_row gives no null.
template <class T, class PackLeft, class RightRow, class Finish>
void streamed_product(const GemmBlocking& blocking, void* scratch, int64_t rows, int64_t depth, int64_t col_begin,
                      int64_t col_end, const PackLeft& pack_left, const RightRow& right_row, const Finish& finish) {
  using Outer = typename OuterOf<T>::Type;
  constexpr int64_t kSize = sizeof(float), kElements = Outer::kElements, kWhole = kStreamedWords * kElements;
  OuterLeft<Outer> left(scratch);
  float* const chunk_sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.right_offset);
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset);
  const OuterChunks chunks(blocking, depth, kElements);
  const int64_t room =
      min(kStreamedSums,
          min(blocking.sums_offset - blocking.right_offset, blocking.scratch_bytes - blocking.sums_offset) / kSize);
  const int64_t width = room / rows / kLanes * kLanes, size = rows * width;
  if (chunks.pack_once) pack_left(left, rows, 0, depth);
  for (int64_t col = col_begin; col < col_end; col += width) {
    const int64_t cols = min(width, col_end - col);
    for (int64_t i = 0; i < size; i += kLanes) store(sums + i, VecF{});
    for (int64_t begin = 0; begin < depth; begin += chunks.size) {
      const int64_t part = begin % chunks.packed;
      const int64_t end = min(begin + chunks.size, depth);
      if (!chunks.pack_once && part == 0) pack_left(left, rows, begin, min(chunks.packed, depth - begin));
      for (int64_t i = 0; i < size; i += kLanes) store(chunk_sums + i, VecF{});
      for (int64_t k = begin, n; k < end; k += n) {
        n = end - k >= kWhole ? kWhole : min(kElements, end - k);
        const T *right[kWhole] = {}, *next[kWhole];
        for (int64_t i = 0; i < n; ++i) right[i] = right_row(k + i, col);
        for (int64_t i = 0; i < kWhole; ++i) next[i] = right_row(min(k + n + i, depth - 1), col);
        for (int64_t row = 0; row < rows; row += kStreamedTile) {
          OuterOperands<Outer> t;
          left.set(t, row, part + k - begin);
          t.sums = chunk_sums + row * width;
          t.sums_stride = width;
          const auto add = n == kWhole ? add_streamed_rows<T, kStreamedWords> : add_streamed_rows<T, 1>;
          add(min(int64_t{kStreamedTile}, rows - row), t, right, next, cols);
        }
      }
      for (int64_t i = 0; i < size; i += kLanes) {
        store(sums + i, begin > 0 ? load(sums + i) + load(chunk_sums + i) : load(chunk_sums + i));
      }
    }
    for (int64_t row = 0; row < rows; ++row) finish(row, col, cols, sums + row * width);
  }
}

}  // namespace
}  // namespace moekernels::cpu
