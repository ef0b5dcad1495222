// left [rows, depth] @ right [depth, cols] by tile registers, for operands of which neither can be multiplied where it
// lies.
//
//   pack the rows of left                                      for the whole depth, if that fits the scratch memory
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each chunk of the depth
//       pack that part of right
//       for each two groups of columns, for each two of rows   multiply_tiles
//     hand the sums over
#pragma once

#include "cpu/isa/amx/pack.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kAmxChunk = 256;  // elements of K: the operands of multiply_tiles stay in the first-level cache

// Where few rows are on the left, what is packed of the right operand is read so seldom that it is not to leave the
// first-level cache.
constexpr int64_t kAmxFewLeftGroups = 2, kAmxShortChunk = 64;

MOEKERNELS_INLINE int64_t groups_of(int64_t n, int64_t size = kAmxRows) {
  return ceil_div(n, size);
}

MOEKERNELS_INLINE void clear_sums(float* sums, int64_t tiles) {
  for (int64_t i = 0; i < tiles * kAmxSums; ++i) sums[i] = 0.0f;
}

// pack_left(packed, rows, k, n) packs elements k .. k + n of all rows; right_row(k, col) is row k of right from a
// column on, or null for zeros; store(row, col, n, low, high) takes the sums of n columns, at most two vectors.
template <class PackLeft, class RightRow, class Store>
void amx_product(const GemmBlocking& blocking, void* scratch, int64_t rows, int64_t depth, int64_t col_begin,
                 int64_t col_end, const PackLeft& pack_left, const RightRow& right_row, const Store& store) {
  const AmxTiles registers;
  AmxPacked left(scratch);
  AmxPacked right(static_cast<char*>(scratch) + blocking.right_offset);
  float* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset);
  const bool pack_once = depth <= blocking.depth;
  const int64_t row_groups = groups_of(rows);
  const int64_t chunk = row_groups <= kAmxFewLeftGroups ? kAmxShortChunk : kAmxChunk;  // the same sums
  if (pack_once) pack_left(left, rows, 0, depth);
  for (int64_t col = col_begin; col < col_end; col += blocking.cols) {
    const int64_t cols = min(blocking.cols, col_end - col);
    const int64_t col_groups = 2 * groups_of(cols, 2 * kAmxRows);
    const int64_t stride = col_groups * kAmxSums;  // between groups of rows
    if (depth == 0) clear_sums(sums, row_groups * col_groups);
    for (int64_t begin = 0; begin < depth; begin += chunk) {
      const int64_t part = begin % blocking.depth;  // of the left operand, packed anew at each beginning
      if (!pack_once && part == 0) pack_left(left, rows, begin, min(blocking.depth, depth - begin));
      const int64_t n = min(chunk, depth - begin);
      right.pack_right_transposed(cols, n, depth - begin, [&](int64_t k) { return right_row(begin + k, col); });
      for (int64_t c = 0; c < col_groups; c += 2) {
        const BFloat16* packed[2] = {right.at(c, 0), right.at(c + 1, 0)};
        for (int64_t r = 0; r < row_groups; r += 2) {
          const int64_t lefts = min(2, row_groups - r);
          AmxLeft pair[2] = {};
          for (int64_t l = 0; l < lefts; ++l) pair[l] = {left.at(r + l, part / kAmxDepth), kAmxDepth, kAmxElements};
          multiply_tiles(lefts, 2, pair, packed, groups_of(n, kAmxDepth), sums + r * stride + c * kAmxSums, stride,
                         begin > 0);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* of_row = sums + row / kAmxRows * stride + row % kAmxRows * kAmxRows;
      for (int64_t c = 0; c < cols; c += 2 * kLanes) {
        VecF low = load(of_row + c / kAmxRows * kAmxSums);
        VecF high = load(of_row + (c / kAmxRows + 1) * kAmxSums);
        AmxPacked::in_order(low, high);
        store(row, col + c, cols - c, low, high);
      }
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
