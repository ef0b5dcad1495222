// One task of the grouped GEMM: packs its rows, multiplies them with its columns' weight rows, finishes the sums.
//
//   pack the rows, gathering and widening                      into tiles [steps][tile rows][step]
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each panel of 4 weight rows                          read from memory once
//       for each chunk of K                                    panel and tile stay in the first-level cache
//         for each tile of rows                                multiply_tile; the next panel is prefetched meanwhile
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

template <class Dot>
class GemmTaskRunner {
 public:
  using Weight = typename Dot::Weight;

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
    if (pack_once_) pack(0, p_.in_features);
    for (Columns cols = columns_at(task_.col_begin); cols.count > 0; cols = columns_at(cols.begin + cols.count)) {
      if (p_.in_features == 0) clear_sums(cols);
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const int64_t n = min(blocking_.depth, p_.in_features - k);
        if (!pack_once_) pack(k, n);
        multiply(cols, k, n);
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

  Columns columns_at(int64_t begin) const {
    Columns cols;
    cols.begin = begin;
    cols.count = min(blocking_.cols, task_.col_end - begin);
    cols.width = round_up(cols.count, kTileCols);
    cols.sums_stride = p_.gated ? 2 * cols.width : cols.width;
    return cols;
  }

  void pack(int64_t k, int64_t n) {
    rows_.pack([&](int64_t row) { return source_.at(task_.row_begin + row, k); }, n);
  }

  // The weight rows of a panel; gate panels come first, then value panels. Past the last column it repeats.
  void weight_rows(const Columns& cols, int64_t panel, int64_t k, const Weight* (&weight)[kTileCols]) const {
    const bool value = panel * kTileCols >= cols.width;
    const int64_t first = panel * kTileCols - (value ? cols.width : 0);
    for (int64_t c = 0; c < kTileCols; ++c) {
      weight[c] = weight_.row(cols.begin + min(first + c, cols.count - 1), value) + k;
    }
  }

  // The weight rows that are needed after a panel; false after the last one.
  bool next_weight_rows(const Columns& cols, int64_t panel, int64_t k, const Weight* (&weight)[kTileCols]) const {
    if ((panel + 1) * kTileCols < cols.sums_stride) {
      weight_rows(cols, panel + 1, k, weight);
      return true;
    }
    const Columns next = columns_at(cols.begin + cols.count);
    if (next.count <= 0 || !pack_once_) return false;
    weight_rows(next, 0, 0, weight);
    return true;
  }

  void multiply(const Columns& cols, int64_t k_begin, int64_t depth) {
    TileOperands<Dot> t;
    t.sums_stride = cols.sums_stride;
    const Weight* panel_rows[kTileCols];
    const Weight* next_rows[kTileCols] = {};
    for (int64_t panel = 0; panel * kTileCols < cols.sums_stride; ++panel) {
      weight_rows(cols, panel, k_begin, panel_rows);
      PanelFetch<Weight> fetch;
      fetch.has_far = fetch.has_near = next_weight_rows(cols, panel, k_begin, next_rows);
      for (int64_t k = 0; k < depth; k += Dot::kChunk) {
        t.n = min(Dot::kChunk, depth - k);
        t.add = k_begin + k > 0;
        for (int c = 0; c < kTileCols; ++c) {
          t.weight[c] = panel_rows[c] + k;
          fetch.far[c] = next_rows[c] + k;
          fetch.near[c] = k + Dot::kChunk < depth ? t.weight[c] + Dot::kChunk : next_rows[c];
        }
        multiply_panel(rows_, k, sums_ + panel * kTileCols, fetch, t);
      }
    }
  }

  void clear_sums(const Columns& cols) {
    for (int64_t i = 0; i < rows_.rows() * cols.sums_stride; ++i) sums_[i] = 0.0f;
  }

  void finish(const Columns& cols, int64_t row) {
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
  const bool pack_once_;
};

template <class Dot>
void run_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch) {
  GemmTaskRunner<Dot>(params, blocking, task, scratch).run();
}

}  // namespace
}  // namespace moekernels::cpu
