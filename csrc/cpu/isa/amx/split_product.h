// Products of packed operands that are split in three (amx/split.h).
//
// Sums start anew with every chunk of K and are added up in float32: no more is rounded away than by the vector
// kernels.
#pragma once

#include "cpu/isa/amx/product.h"
#include "cpu/isa/amx/split.h"

namespace moekernels::cpu {
namespace {

template <int kLefts>
MOEKERNELS_INLINE void load_left(const BFloat16* const (&groups)[2], int64_t offset) {
  _tile_loadd(4, groups[0] + offset, kAmxStride);
  if constexpr (kLefts > 1) _tile_loadd(5, groups[1] + offset, kAmxStride);
}

template <int kRights>
MOEKERNELS_INLINE void load_right(const BFloat16* const (&groups)[2], int64_t offset) {
  _tile_loadd(6, groups[0] + offset, kAmxStride);
  if constexpr (kRights > 1) _tile_loadd(7, groups[1] + offset, kAmxStride);
}

// `next` goes on for some steps while the tile unit multiplies.
template <int kLefts, int kRights, class Next>
MOEKERNELS_INLINE void multiply_loaded(Next& next, int64_t steps) {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kRights > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kLefts > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kLefts > 1 && kRights > 1) _tile_dpbf16ps(3, 5, 7);
  next.step(steps);
}

constexpr int64_t kSplitProducts = 6;  // for each tile of K

// sums[l][r] (+)= left[l] * right[r] over `tiles` tiles of K. Sums of the same left lie side by side.
template <int kLefts, int kRights, class Next>
void multiply_split(const BFloat16* const (&left)[2], const BFloat16* const (&right)[2], int64_t tiles, float* sums,
                    int64_t sums_stride, bool add, Next& next, int64_t steps) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  _tile_zero(0);
  if constexpr (kRights > 1) _tile_zero(1);
  if constexpr (kLefts > 1) _tile_zero(2);
  if constexpr (kLefts > 1 && kRights > 1) _tile_zero(3);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t part0 = tile * kSplitTile, part1 = part0 + kAmxElements, part2 = part1 + kAmxElements;
    load_left<kLefts>(left, part2);
    load_right<kRights>(right, part0);
    multiply_loaded<kLefts, kRights>(next, steps);
    load_left<kLefts>(left, part1);
    multiply_loaded<kLefts, kRights>(next, steps);
    load_right<kRights>(right, part1);
    multiply_loaded<kLefts, kRights>(next, steps);
    load_left<kLefts>(left, part0);
    multiply_loaded<kLefts, kRights>(next, steps);
    load_right<kRights>(right, part2);
    multiply_loaded<kLefts, kRights>(next, steps);
    load_right<kRights>(right, part0);
    multiply_loaded<kLefts, kRights>(next, steps);
  }
  alignas(64) float chunk[4][kAmxSums];
  float* to[4];
  for (int i = 0; i < 4; ++i) to[i] = add ? chunk[i] : sums + i / 2 * sums_stride + i % 2 * kAmxSums;
  _tile_stored(0, to[0], kAmxStride);
  if constexpr (kRights > 1) _tile_stored(1, to[1], kAmxStride);
  if constexpr (kLefts > 1) _tile_stored(2, to[2], kAmxStride);
  if constexpr (kLefts > 1 && kRights > 1) _tile_stored(3, to[3], kAmxStride);
  if (!add) return;
  asm volatile("" ::: "memory");
  for (int l = 0; l < kLefts; ++l) {
    for (int r = 0; r < kRights; ++r) {
      float* of_all = sums + l * sums_stride + r * kAmxSums;
      MOEKERNELS_UNROLL
      for (int i = 0; i < kAmxSums; i += kLanes) store(of_all + i, load(of_all + i) + load(chunk[2 * l + r] + i));
    }
  }
}

template <class Next>
MOEKERNELS_INLINE void multiply_split(int64_t lefts, int64_t rights, const BFloat16* const (&left)[2],
                                      const BFloat16* const (&right)[2], int64_t tiles, float* sums,
                                      int64_t sums_stride, bool add, Next& next, int64_t steps) {
  if (lefts > 1) {
    if (rights > 1) return multiply_split<2, 2>(left, right, tiles, sums, sums_stride, add, next, steps);
    return multiply_split<2, 1>(left, right, tiles, sums, sums_stride, add, next, steps);
  }
  if (rights > 1) return multiply_split<1, 2>(left, right, tiles, sums, sums_stride, add, next, steps);
  return multiply_split<1, 1>(left, right, tiles, sums, sums_stride, add, next, steps);
}

// How many steps after each product let `next` finish within so many calls of multiply_split.
template <class Next>
int64_t steps_per_product(const Next& next, int64_t calls, int64_t tiles) {
  const int64_t products = calls * tiles * kSplitProducts;
  return products > 0 ? ceil_div(next.steps_left(), products) : 0;
}

// left [rows, depth] @ right [depth, cols], cut as in amx/product.h.
template <class PackLeft, class RightRow, class Store>
void split_product(const GemmBlocking& blocking, void* scratch, int64_t rows, int64_t depth, int64_t col_begin,
                   int64_t col_end, const PackLeft& pack_left, const RightRow& right_row, const Store& store) {
  const AmxTiles registers;
  BFloat16* const chunks = reinterpret_cast<BFloat16*>(static_cast<char*>(scratch) + blocking.right_offset);
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset);
  const bool pack_once = depth <= blocking.depth;
  const int64_t row_groups = groups_of(rows);
  const auto left_from = [&](int64_t begin) {
    const int64_t first = begin / blocking.depth * blocking.depth;
    return SplitPacked(scratch, min(blocking.depth, depth - first));
  };
  if (pack_once) pack_left(left_from(0), rows, 0, depth);
  for (int64_t col = col_begin; col < col_end; col += blocking.cols) {
    const int64_t cols = min(blocking.cols, col_end - col);
    const int64_t col_groups = groups_of(cols);
    const int64_t stride = col_groups * kAmxSums;  // between groups of rows
    if (depth == 0) clear_sums(sums, row_groups * col_groups);
    // Two chunks have memory: one is multiplied, and the next one is split.
    const auto right_from = [&](int64_t begin) {
      return SplitPacked(chunks + begin / kSplitChunk % 2 * (blocking.cols * kSplitChunk * kSplitParts),
                         min(kSplitChunk, depth - begin));
    };
    const auto splitting = [&](int64_t begin) {
      const int64_t n = begin < depth ? min(kSplitChunk, depth - begin) : 0;
      return SplitMnMajor(SplitPacked(right_from(begin).at(0, 0), n), cols, n,
                          [&right_row, begin, col](int64_t k) { return right_row(begin + k, col); });
    };
    splitting(0).finish();
    for (int64_t begin = 0; begin < depth; begin += kSplitChunk) {
      const SplitPacked left = left_from(begin), right = right_from(begin);
      const int64_t part = begin % blocking.depth;  // of the left operand, packed anew at each beginning
      if (!pack_once && part == 0) pack_left(left, rows, begin, min(blocking.depth, depth - begin));
      auto next = splitting(begin + kSplitChunk);
      const int64_t steps = steps_per_product(next, (col_groups + 1) / 2 * ((row_groups + 1) / 2), right.tiles());
      for (int64_t c = 0; c < col_groups; c += 2) {
        const int64_t rights = min(2, col_groups - c);
        const BFloat16* columns[2] = {right.at(c, 0), right.at(c + rights - 1, 0)};
        for (int64_t r = 0; r < row_groups; r += 2) {
          const int64_t lefts = min(2, row_groups - r);
          const BFloat16* packed[2] = {left.at(r, part / kAmxDepth), left.at(r + lefts - 1, part / kAmxDepth)};
          multiply_split(lefts, rights, packed, columns, right.tiles(), sums + r * stride + c * kAmxSums, stride,
                         begin > 0, next, steps);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* of_row = sums + row / kAmxRows * stride + row % kAmxRows * kAmxRows;
      for (int64_t c = 0; c < cols; c += kLanes) store(row, col + c, cols - c, load(of_row + c / kAmxRows * kAmxSums));
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
