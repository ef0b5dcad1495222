// One task of the grouped GEMM: packs its rows, multiplies them with its columns' weight rows, finishes the sums.
//
//   pack the rows, gathering and widening                      into tiles [steps][tile rows][step], unless they are
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each block of panels of 4 weight rows                read from memory once, into the second-level cache
//       for each chunk of K
//         for each group of tiles of rows                      that stays in the first-level cache
//           for each panel                                     which stays there, too, while it meets
//             for each tile                                    multiply_tile; later panels are prefetched meanwhile
//     bias, activation, gate, scale and rounding, row by row
//
// Where K is so long that the packed rows would not fit, the block of columns goes through K in several parts, each
// packed anew.
#pragma once

#include "cpu/isa/expert_weight.h"
#include "cpu/isa/gathered_rows.h"
#include "cpu/isa/gemm_epilogue.h"
#include "cpu/isa/gemm_pack.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kBlockWeightRows = 128;  // whose sums are kept at a time

template <class Dot>
class GemmTaskRunner {
 public:
  using Weight = typename Dot::Weight;
  static constexpr int64_t kBlockPanels = 8;

  GemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        source_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        weight_(params, task),
        epilogue_(params, task),
        rows_(scratch, task.row_end - task.row_begin),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)),
        pack_once_(params.in_features <= blocking.depth) {}

  void run() {
    if (pack_once_) pack(0, p_.in_features, task_.rows_packed);
    for (Columns cols = columns_at(task_.col_begin); cols.count > 0; cols = columns_at(cols.begin + cols.count)) {
      if (p_.in_features == 0) clear_sums(cols);
      find_weight_rows(cols);
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const Part part{cols, k, min(blocking_.depth, p_.in_features - k)};
        if (!pack_once_) pack(k, part.depth, false);
        multiply(part);
      }
      for (int64_t row = 0; row < rows_.rows(); ++row) finish(cols, row);
    }
  }

 private:
  // A block of output columns; none are left when count is 0.
  struct Columns {
    int64_t begin, count;
    int64_t width;        // count, rounded up to whole panels
    int64_t sums_stride;  // twice that when gated: the gate's sums, then the value's
  };

  // A block of columns, and the elements of K that are packed.
  struct Part {
    Columns cols;
    int64_t k, depth;

    int64_t panels() const { return cols.sums_stride / kTileCols; }
  };

  // A panel of a block, and where its chunk of K begins in the part.
  struct Position {
    int64_t block, panel, k;
  };

  Columns columns_at(int64_t begin) const {
    Columns cols;
    cols.begin = begin;
    cols.count = min(min(blocking_.cols, kBlockWeightRows / (p_.gated ? 2 : 1)), task_.col_end - begin);
    cols.width = round_up(cols.count, kTileCols);
    cols.sums_stride = p_.gated ? 2 * cols.width : cols.width;
    return cols;
  }

  void pack(int64_t k, int64_t n, bool packed) {
    if (packed) return rows_.resize(n);
    rows_.pack([&](int64_t row) { return source_.at(task_.row_begin + row, k); }, n);
  }

  // The weight rows of the panels of a block of columns, and of the first ones of the next block. Gate panels come
  // first, then value panels. Past the last column they repeat.
  void find_weight_rows(const Columns& cols) {
    const int64_t panels = cols.sums_stride / kTileCols;
    const Columns next = columns_at(cols.begin + cols.count);
    for (int64_t panel = 0; panel < panels + kBlockPanels; ++panel) {
      const bool ahead = panel >= panels && next.count > 0;
      find_weight_rows(ahead ? next : cols, ahead ? panel - panels : min(panel, panels - 1), weight_rows_[panel]);
    }
  }

  void find_weight_rows(const Columns& cols, int64_t panel, const Weight* (&weight)[kTileCols]) const {
    const bool value = panel * kTileCols >= cols.width;
    const int64_t first = panel * kTileCols - (value ? cols.width : 0);
    for (int64_t c = 0; c < kTileCols; ++c) {
      weight[c] = weight_.row(cols.begin + min(first + c, cols.count - 1), value);
    }
  }

  // So many panels later, a block at most: in the next chunk of K after the last panel of a block, and in the next
  // block after its last chunk.
  Position later(const Part& part, Position at, int64_t panels) const {
    const int64_t size = min(kBlockPanels, part.panels() - at.block);
    at.panel += panels;
    while (at.panel >= at.block + size) {
      if (at.k + Dot::kChunk >= part.depth) return {at.block + size, at.panel, 0};
      at.k += Dot::kChunk;
      at.panel -= size;
    }
    return at;
  }

  // A chunk of the rows shall stay in the first-level cache. Rows that are a little too many go through a block by
  // halves: the second half finds its weights in the second-level cache, and both fetch the next block. Still more rows
  // wait for their products, not for weights.
  void multiply(const Part& part) {
    constexpr int64_t kChunkBytes = Dot::kChunk * int64_t(sizeof(typename Dot::Packed));
    constexpr int64_t kTogether = 36 * 1024 / kChunkBytes, kByHalves = 64 * 1024 / kChunkBytes;
    const int64_t groups = rows_.rows() > kTogether && rows_.rows() <= kByHalves ? 2 : 1;
    const int64_t far_panels = groups > 1 ? kBlockPanels : rows_.rows() <= kTogether ? 2 : 1;
    TileOperands<Dot> t;
    t.sums_stride = part.cols.sums_stride;
    for (Position at{}; at.block < part.panels(); at.block += kBlockPanels) {
      const int64_t block_end = min(at.block + kBlockPanels, part.panels());
      for (at.k = 0; at.k < part.depth; at.k += Dot::kChunk) {
        t.n = min(Dot::kChunk, part.depth - at.k);
        t.add = part.k + at.k > 0;
        for (int64_t group = 0; group < groups; ++group) {
          for (at.panel = at.block; at.panel < block_end; ++at.panel) {
            const bool again = group + 1 < groups && at.panel + 1 == block_end;
            const Position near = again ? Position{at.block, at.block, at.k} : later(part, at, 1);
            const Position far = later(part, at, far_panels);
            for (int c = 0; c < kTileCols; ++c) {
              t.weight[c] = weight_rows_[at.panel][c] + part.k + at.k;
              t.near[c] = weight_rows_[near.panel][c] + part.k + near.k;
              t.far[c] = weight_rows_[far.panel][c] + part.k + far.k;
            }
            multiply_panel(rows_, rows_.tiles() * group / groups, rows_.tiles() * (group + 1) / groups, at.k,
                           sums_ + at.panel * kTileCols, t);
          }
        }
      }
    }
  }

  void clear_sums(const Columns& cols) {
    for (int64_t i = 0; i < rows_.rows() * cols.sums_stride; ++i) sums_[i] = 0.0f;
  }

  // Not inlined: compilers then keep fewer constants in registers.
  __attribute__((noinline)) void finish(const Columns& cols, int64_t row) {
    const float* sums = sums_ + row * cols.sums_stride;
    for (int64_t c = 0; c < cols.count; c += kLanes) {
      const int64_t n = cols.count - c;
      const VecF value = p_.gated ? load_n(sums + cols.width + c, n) : VecF{};
      epilogue_.store(task_.row_begin + row, cols.begin + c, n, load_n(sums + c, n), value);
    }
  }

  const GroupedGemmParams& p_;
  const GemmBlocking& blocking_;
  const GemmTask& task_;
  const GatheredRows<Weight> source_;
  const TaskWeight<Weight> weight_;
  const GemmEpilogue<Weight> epilogue_;
  PackedRows<Dot> rows_;
  float* const sums_;  // [rows][sums_stride] of the current columns
  const Weight* weight_rows_[kBlockWeightRows / kTileCols + kBlockPanels][kTileCols];
  const bool pack_once_;
};

template <class Dot>
void run_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch) {
  GemmTaskRunner<Dot>(params, blocking, task, scratch).run();
}

}  // namespace
}  // namespace moekernels::cpu
