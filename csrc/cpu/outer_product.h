// left [rows, depth] @ right [depth, cols] in float32 by outer products; both are widened when they are packed.
//
//   pack the rows of left                                      for the whole depth, if that fits the scratch memory
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each chunk of the depth, for each panel of columns
//       pack that part of right                                it stays in the first-level cache
//       for each tile of rows                                  multiply_outer
//     hand the sums over
#pragma once

#include "kernel_table.h"
#include "outer_tile.h"
#include "parts.h"

namespace moekernels::cpu {
namespace {

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

constexpr int64_t kOuterPadding = kLanes;

// The left operand in scratch memory. Without the padding its lines were often a power of two apart, and would
// compete for the same few places of the first-level cache.
class OuterLeft {
 public:
  explicit OuterLeft(void* memory) : packed_(static_cast<float*>(memory)) {}

  // Rows source(row)[0 .. n); null: zeros.
  template <class Source>
  void pack(int64_t rows, int64_t n, const Source& source) {
    row_stride_ = rounded_up(n, kLanes) + kOuterPadding;
    step_ = 1;
    for (int64_t row = 0; row < rows; ++row) widen_row(source(row), n, packed_ + row * row_stride_);
  }

  // The same of a matrix that lies across: source(k)[row] for k in [0, n).
  template <class Source>
  void pack_transposed(int64_t rows, int64_t n, const Source& source) {
    row_stride_ = 1;
    step_ = rounded_up(rows, kLanes) + kOuterPadding;
    for (int64_t k = 0; k < n; ++k) widen_row(source(k), rows, packed_ + k * step_);
  }

  // As the left operand of a tile, from a row and an element of K on.
  MOEKERNELS_INLINE void set(OuterOperands& t, int64_t row, int64_t k) const {
    t.left = packed_ + row * row_stride_ + k * step_;
    t.left_stride = row_stride_;
    t.left_step = step_;
  }

 private:
  float* packed_;
  int64_t row_stride_ = 0, step_ = 0;
};

// pack_left(packed, rows, k, n) packs elements k .. k + n of all rows; right_row(k, col) is row k of right from a
// column on, or null for zeros; store(row, col, n, sums) takes the sums of n columns, at most a vector.
template <class PackLeft, class RightRow, class Store>
void outer_product(const GemmBlocking& blocking, void* scratch, int64_t rows, int64_t depth, int64_t col_begin,
                   int64_t col_end, const PackLeft& pack_left, const RightRow& right_row, const Store& store_sums) {
  OuterLeft left(scratch);
  float* const panel = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.right_offset);
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset);
  const bool pack_once = depth <= blocking.depth;
  const Parts tiles(rows, kOuterRows);
  if (pack_once) pack_left(left, rows, 0, depth);
  for (int64_t col = col_begin; col < col_end; col += blocking.cols) {
    const int64_t cols = smaller(blocking.cols, col_end - col);
    const int64_t stride = rounded_up(cols, kLanes);
    const Parts panels(stride / kLanes, kOuterVectors);
    if (depth == 0) {
      for (int64_t i = 0; i < rows * stride; ++i) sums[i] = 0.0f;
    }
    for (int64_t begin = 0; begin < depth; begin += kOuterChunk) {
      const int64_t part = begin % blocking.depth;  // of the left operand, packed anew at each beginning
      const int64_t n = smaller(kOuterChunk, depth - begin);
      if (!pack_once && part == 0) pack_left(left, rows, begin, smaller(blocking.depth, depth - begin));
      OuterOperands t;
      t.right = panel;
      t.n = n;
      t.sums_stride = stride;
      t.add = begin > 0;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p) * kLanes, width = panels.size(p) * kLanes;
        for (int64_t k = 0; k < n; ++k) {
          widen_row(right_row(begin + k, col + first), smaller(width, cols - first), panel + k * width);
        }
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          left.set(t, tiles.begin(tile), part);
          t.sums = sums + tiles.begin(tile) * stride + first;
          multiply_outer(tiles.size(tile), panels.size(p), t);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < cols; c += kLanes) store_sums(row, col + c, cols - c, load(sums + row * stride + c));
    }
  }
}

}  // namespace
}  // namespace moekernels::cpu
