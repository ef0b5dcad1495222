// left [rows, depth] @ right [depth, cols] by outer products, summed in float32.
//
//   pack the rows of left                                      for the whole depth, if that fits the scratch memory
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each chunk of the depth, for each panel of columns
//       pack that part of right                                it stays in the first-level cache
//       for each tile of rows                                  multiply_outer; the next panel is fetched meanwhile
//     hand the sums over, row by row
#pragma once

#include "cpu/isa/outer_pack.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// Of a row, what a panel has. From memory to the second-level cache: few lines of a page are wanted, so that hardware
// prefetchers do not see it coming.
template <class T>
MOEKERNELS_INLINE void fetch_columns(const T* row) {
  MOEKERNELS_UNROLL
  for (int i = 0; i < kOuterCols * int(sizeof(T)) / 64; ++i) __builtin_prefetch(row + i * 64 / int(sizeof(T)), 0, 2);
}

// How K is cut. Chunks are equal but for the last, which has a little less: a few elements alone would cost as much
// adding as many.
struct OuterChunks {
  OuterChunks(const GemmBlocking& blocking, int64_t depth, int64_t elements)
      : size(depth == 0 ? 0 : round_up(ceil_div(depth, ceil_div(depth, kOuterChunk * elements)), elements)),
        pack_once(depth <= blocking.depth),
        packed(pack_once ? depth : blocking.depth / size * size) {}

  const int64_t size;  // elements, whole words
  const bool pack_once;
  const int64_t packed;  // elements of the left operand at a time
};

// pack_left(packed, rows, k, n) packs elements k .. k + n of all rows; right_row(k, col) is row k of right from a
// column on, or null for zeros; finish(row, col, n, sums) takes the sums of n columns.
template <class Outer, class PackLeft, class RightRow, class Finish>
void outer_product(const GemmBlocking& blocking, void* scratch, int64_t rows, int64_t depth, int64_t col_begin,
                   int64_t col_end, const PackLeft& pack_left, const RightRow& right_row, const Finish& finish) {
  using Word = typename Outer::Word;
  OuterLeft<Outer> left(scratch);
  Word* const panel = reinterpret_cast<Word*>(static_cast<char*>(scratch) + blocking.right_offset);
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset);
  const OuterChunks chunks(blocking, depth, Outer::kElements);
  const int64_t chunk = chunks.size, packed = chunks.packed;
  const Parts tiles(rows, kOuterRows);
  if (chunks.pack_once) pack_left(left, rows, 0, depth);
  for (int64_t col = col_begin; col < col_end; col += blocking.cols) {
    const int64_t cols = min(blocking.cols, col_end - col);
    const int64_t stride = round_up(cols, kLanes);
    const Parts panels(stride / kLanes, kOuterVectors);
    if (depth == 0) {
      for (int64_t i = 0; i < rows * stride; ++i) sums[i] = 0.0f;
    }
    for (int64_t begin = 0; begin < depth; begin += chunk) {
      const int64_t part = begin % packed;  // of the left operand, packed anew at each beginning
      const int64_t n = min(chunk, depth - begin);
      if (!chunks.pack_once && part == 0) pack_left(left, rows, begin, min(packed, depth - begin));
      OuterOperands<Outer> t;
      t.right = panel;
      t.n = ceil_div(n, Outer::kElements);
      t.sums_stride = stride;
      t.add = begin > 0;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p) * kLanes, width = panels.size(p) * kLanes;
        const auto row = [&](int64_t k) { return right_row(begin + k, col + first); };
        for (int64_t k = 0; k < t.n; ++k) pack_word(row, k, n, min(width, cols - first), panel + k * width);
        // What is packed next lies beside this panel, or in the next chunk.
        const bool last = p + 1 == panels.count;
        const int64_t next = begin + (last ? n : 0), next_col = col + (last ? 0 : first + width);
        const Parts shares(min(chunk, depth - next), ceil_div(chunk, tiles.count));
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          if (MOEKERNELS_FETCH_FROM_MEMORY && tile < shares.count) {
            const int64_t from = next + shares.begin(tile);
            for (int64_t k = 0; k < shares.size(tile); ++k) fetch_columns(right_row(from + k, next_col));
          }
          left.set(t, tiles.begin(tile), part);
          t.sums = sums + tiles.begin(tile) * stride + first;
          multiply_outer_tile<Outer>(tiles.size(tile), panels.size(p), t);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) finish(row, col, cols, sums + row * stride);
  }
}

}  // namespace
}  // namespace moekernels::cpu
