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

// The panel that will be packed next, shared out among the tiles that are multiplied before. Of rows that are wide
// apart the processor itself fetches nothing ahead.
template <int kElementSize>
class OuterNext {
 public:
  // n rows from right_row(begin, col) on; tiles multiply for so many steps each.
  template <class RightRow>
  void set(const RightRow& right_row, int64_t begin, int64_t n, int64_t col, int64_t tiles, int64_t steps) {
    if constexpr (!MOEKERNELS_FETCH_FROM_MEMORY) return;
    for (int64_t k = 0; k < n; ++k) {
      const auto* const row = right_row(begin + k, col);
      rows_[k] = reinterpret_cast<const char*>(row != nullptr ? static_cast<const void*>(row) : rows_);
    }
    lines_ = n << kShift;
    share_ = ceil_div(lines_, tiles);
    next_ = {rows_, 0, 0, ceil_div(share_, steps), kShift};
  }

  OuterFetch share() {
    next_.line = next_.end;
    next_.end = min(next_.end + share_, lines_);
    return next_;
  }

 private:
  static constexpr int kLines = kOuterCols * kElementSize / OuterFetch::kLine;  // of a row
  static constexpr int kShift = kLines > 1 ? __builtin_ctz(kLines) : 0;
  const char* rows_[2 * kOuterChunk];
  int64_t lines_ = 0, share_ = 0;
  OuterFetch next_{};
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
  OuterNext<sizeof(*right_row(0, 0))> next;
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
      t.n = ceil_div(n, Outer::kElements);
      t.sums_stride = stride;
      t.add = begin > 0;
      t.right = panel;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p) * kLanes, width = panels.size(p) * kLanes;
        const auto row = [&](int64_t k) { return right_row(begin + k, col + first); };
        for (int64_t k = 0; k < t.n; ++k) pack_word(row, k, n, min(width, cols - first), panel + k * width);
        // What is packed next lies beside this panel, in the next chunk, or in the next columns.
        const bool new_chunk = p + 1 == panels.count, new_cols = new_chunk && begin + n == depth;
        const int64_t next_begin = new_cols ? 0 : new_chunk ? begin + n : begin;
        const int64_t next_col = col + (new_cols ? cols : new_chunk ? 0 : first + width);
        const int64_t next_rows = next_col < col_end ? min(chunk, depth - next_begin) : 0;
        next.set(right_row, next_begin, next_rows, next_col, tiles.count, t.n);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          left.set(t, tiles.begin(tile), part);
          t.sums = sums + tiles.begin(tile) * stride + first;
          t.fetch = next.share();
          multiply_outer_tile<Outer>(tiles.size(tile), panels.size(p), t);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) finish(row, col, cols, sums + row * stride);
  }
}

}  // namespace
}  // namespace moekernels::cpu
