// Transposition of small blocks of 16-bit elements, for tile registers, whose operands lie along the dimension that is
// summed over. Vectors have 64 bytes.
//
// A block is kTransposedRows rows of a matrix, each found by a function so that rows may be gathered; after it, the
// elements of a column lie one after the other. Elements are first joined to pairs from two rows; then words of 32 bits
// are transposed in registers.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

template <class T>
constexpr int kTransposedRows = MOEKERNELS_VECTOR_BYTES / int(sizeof(T));

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

// Word j of a block: elements c .. c + kLanes of rows 2 * j and 2 * j + 1 in pairs.
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
