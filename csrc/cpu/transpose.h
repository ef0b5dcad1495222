// Transposition of small blocks, for operands that do not lie along the dimension that a dot product sums over.
//
// A block is kTransposedRows rows of a matrix, each found by a function so that rows may be gathered; after it, the
// elements of a column lie one after the other. Elements of 16 bits are first joined to pairs from two rows; then words
// of 32 bits are transposed in registers.
#pragma once

#include "simd.h"

namespace moekernels::cpu {
namespace {

template <class T>
constexpr int kTransposedRows = MOEKERNELS_VECTOR_BYTES / int(sizeof(T));

#if MOEKERNELS_VECTOR_BYTES == 64

// v[i][j] <-> v[j][i]
MOEKERNELS_INLINE void transpose(VecU (&v)[16]) {
  __m512i a[16], b[16];
  MOEKERNELS_UNROLL
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
  }
  // b[4 * g + c]: column c of each of its lanes' four columns, of rows 4 * g .. 4 * g + 3
  MOEKERNELS_UNROLL
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  MOEKERNELS_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = (VecU)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    v[4 + c] = (VecU)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    v[8 + c] = (VecU)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    v[12 + c] = (VecU)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

#elif MOEKERNELS_VECTOR_BYTES == 32

MOEKERNELS_INLINE void transpose(VecU (&v)[8]) {
  __m256i a[8], b[8];
  MOEKERNELS_UNROLL
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)v[i], (__m256i)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)v[i], (__m256i)v[i + 1]);
  }
  MOEKERNELS_UNROLL
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  MOEKERNELS_UNROLL
  for (int c = 0; c < 4; ++c) {
    v[c] = (VecU)_mm256_permute2x128_si256(b[c], b[4 + c], 0x20);
    v[4 + c] = (VecU)_mm256_permute2x128_si256(b[c], b[4 + c], 0x31);
  }
}

#else

MOEKERNELS_INLINE void transpose(VecU (&v)[4]) {
  const VecU a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const VecU c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5), d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

#endif

// Word j of a block: elements c .. c + kLanes of row j, or of rows 2 * j and 2 * j + 1 in pairs.
MOEKERNELS_INLINE VecU block_word(const float* const* rows, int j, int64_t c) {
  return *reinterpret_cast<const VecUMemory*>(rows[j] + c);
}
template <class Half>
MOEKERNELS_INLINE VecU block_word(const Half* const* rows, int j, int64_t c) {
  const VecU low = __builtin_convertvector(*reinterpret_cast<const VecHMemory*>(rows[2 * j] + c), VecU);
  const VecU high = __builtin_convertvector(*reinterpret_cast<const VecHMemory*>(rows[2 * j + 1] + c), VecU);
  return low | high << 16;
}

// Columns first .. first + cols of rows [kTransposedRows] -> target [cols][kTransposedRows], `stride` elements apart
template <class T>
MOEKERNELS_INLINE void transpose_block(const T* const (&rows)[kTransposedRows<T>], int64_t first, int64_t cols,
                                       T* target, int64_t stride) {
  VecU v[kLanes];
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    MOEKERNELS_UNROLL
    for (int j = 0; j < kLanes; ++j) v[j] = block_word(rows, j, first + c);
    transpose(v);
    MOEKERNELS_UNROLL
    for (int j = 0; j < kLanes; ++j) *reinterpret_cast<VecUMemory*>(target + (c + j) * stride) = v[j];
  }
  for (; c < cols; ++c) {
    for (int i = 0; i < kTransposedRows<T>; ++i) target[c * stride + i] = rows[i][first + c];
  }
}

}  // namespace
}  // namespace moekernels::cpu
