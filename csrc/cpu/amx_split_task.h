// Tasks of the grouped GEMM and of the weight gradient in float32 by tile registers (amx_split.h). One with few rows
// streams its weights by vector instructions (gemm_task.h): to split a weight would take longer than to multiply it.
//
// A weight row lies along K, so weights are the left operand of the grouped GEMM and the few rows of the task the right
// one: sums come out as [columns][rows] and are transposed when they are finished. Where the weight lies across K, and
// in the weight gradient, rows are on the left.
#pragma once

#include "amx_split_product.h"
#include "bias_grad.h"
#include "dot.h"
#include "gathered_rows.h"
#include "gemm_epilogue.h"
#include "gemm_task.h"
#include "kernel_table.h"
#include "streamed_output.h"
#include "transposed_gemm_task.h"
#include "weight_grad_task.h"

namespace moekernels::cpu {
namespace {

class SplitGemmTaskRunner {
 public:
  SplitGemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                      void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        weight_(static_cast<const float*>(params.weight) + task.expert * params.weight_expert_stride),
        source_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        epilogue_(params, task.expert),
        rows_(scratch),
        weights_(reinterpret_cast<BFloat16*>(static_cast<char*>(scratch) + blocking.right_offset)),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)),
        num_rows_(task.row_end - task.row_begin),
        row_groups_(groups_of(num_rows_)),
        pack_once_(params.in_features <= blocking.depth) {}

  // Whether all sums are numbers.
  bool run() {
    const AmxTiles tiles;
    if (!task_.rows_packed) pack_all();
    for (Columns cols = columns_at(task_.col_begin); cols.count > 0; cols = columns_at(cols.begin + cols.count)) {
      if (p_.in_features == 0) clear_sums(sums_, cols.num_groups * row_groups_);
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const int64_t n = smaller(blocking_.depth, p_.in_features - k);
        if (!pack_once_) pack(k, n);
        multiply(cols, k, n);
      }
      finish(cols);
    }
    return !nan_.found();
  }

  // The next task may count on it.
  void pack_all() {
    if (pack_once_) pack(0, p_.in_features);
  }

 private:
  // A block of output columns; none are left when count is 0.
  struct Columns {
    int64_t begin, count;
    int64_t groups;      // of 16 columns
    int64_t num_groups;  // twice that when gated: the gate's groups, then the value's
  };

  Columns columns_at(int64_t begin) const {
    Columns cols;
    cols.begin = begin;
    cols.count = smaller(blocking_.cols, task_.col_end - begin);
    cols.groups = groups_of(cols.count);
    cols.num_groups = p_.gated ? 2 * cols.groups : cols.groups;
    return cols;
  }

  void pack(int64_t k, int64_t n) {
    split_right(SplitPacked(rows_, n), num_rows_, n, [&](int64_t row) { return source_.at(task_.row_begin + row, k); });
  }

  // A row of the groups of columns, the gate's before the value's; null where a group has fewer than 16.
  const float* weight_row(const Columns& cols, int64_t index, int64_t k) const {
    const bool value = index >= cols.groups * kAmxRows;
    const int64_t column = value ? index - cols.groups * kAmxRows : index;
    if (column >= cols.count) return nullptr;
    return weight_ + (cols.begin + column + (value ? p_.out_features / 2 : 0)) * p_.weight_row_stride + k;
  }

  // A piece of the block's weights: two groups of columns, or the one that is left, and a chunk of K.
  struct Piece {
    int64_t group, num_groups;
    int64_t k, n;
  };

  void multiply(const Columns& cols, int64_t k_begin, int64_t depth) {
    const SplitPacked rows(rows_, depth);
    const int64_t chunks = (depth + kSplitChunk - 1) / kSplitChunk;
    const int64_t num_pieces = (cols.num_groups + 1) / 2 * chunks;
    const auto piece_at = [&](int64_t i) -> Piece {
      const int64_t group = i / chunks * 2, k = i % chunks * kSplitChunk;
      return {group, smaller(2, cols.num_groups - group), k, smaller(kSplitChunk, depth - k)};
    };
    // Two pieces have memory: one is multiplied, and the next one is split.
    const auto packed = [&](int64_t i) {
      return SplitPacked(weights_ + i % 2 * (2 * kAmxRows * kSplitChunk * kSplitParts), piece_at(i).n);
    };
    const auto splitting = [&](int64_t i) {
      const Piece piece = piece_at(i);
      const int64_t num_rows = i < num_pieces ? piece.num_groups * kAmxRows : 0;
      return SplitRows(packed(i), num_rows, piece.n, [this, &cols, piece, k_begin](int64_t row) {
        return weight_row(cols, piece.group * kAmxRows + row, k_begin + piece.k);
      });
    };
    splitting(0).finish();
    for (int64_t i = 0; i < num_pieces; ++i) {
      const Piece piece = piece_at(i);
      const SplitPacked weights = packed(i);
      const BFloat16* left[2] = {weights.at(0, 0), weights.at(piece.num_groups - 1, 0)};
      auto next = splitting(i + 1);
      const int64_t steps = steps_per_product(next, (row_groups_ + 1) / 2, weights.tiles());
      for (int64_t right = 0; right < row_groups_; right += 2) {
        const int64_t rights = smaller(2, row_groups_ - right);
        const int64_t tile = piece.k / kAmxDepth;
        const BFloat16* row_pair[2] = {rows.at(right, tile), rows.at(right + rights - 1, tile)};
        multiply_split(piece.num_groups, rights, left, row_pair, weights.tiles(),
                       sums_ + (piece.group * row_groups_ + right) * kAmxSums, row_groups_ * kAmxSums,
                       k_begin + piece.k > 0, next, steps);
      }
    }
  }

  void finish(const Columns& cols) {
    for (int64_t group = 0; group < cols.groups; ++group) {
      const int64_t column = group * kAmxRows;
      for (int64_t row_group = 0; row_group < row_groups_; ++row_group) {
        VecU sums[kAmxRows], values[kAmxRows] = {};
        load_transposed(group, row_group, sums);
        if (p_.gated) load_transposed(cols.groups + group, row_group, values);
        const int64_t first = row_group * kAmxRows;
        for (int64_t row = 0; row < smaller(kAmxRows, num_rows_ - first); ++row) {
          nan_.see(VecF(sums[row]));
          nan_.see(VecF(values[row]));
          epilogue_.store(task_.row_begin + first + row, cols.begin + column, cols.count - column, VecF(sums[row]),
                          VecF(values[row]));
        }
      }
    }
  }

  MOEKERNELS_INLINE void load_transposed(int64_t group, int64_t row_group, VecU (&v)[kAmxRows]) const {
    const float* tile = sums_ + (group * row_groups_ + row_group) * kAmxSums;
    MOEKERNELS_UNROLL
    for (int i = 0; i < kAmxRows; ++i) v[i] = VecU(load(tile + i * kAmxRows));
    transpose(v);
  }

  const GroupedGemmParams& p_;
  const GemmBlocking& blocking_;
  const GemmTask& task_;
  const float* const weight_;
  const GatheredRows<float> source_;
  const GemmEpilogue<float> epilogue_;
  void* const rows_;
  BFloat16* const weights_;  // two pieces
  float* const sums_;        // [groups of columns][groups of rows] tiles of the current columns
  const int64_t num_rows_, row_groups_;
  const bool pack_once_;
  NanCheck nan_;
};

// By its rows alone, unless a row's bits may not depend on how many others its expert has.
void run_float32_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                           void* scratch) {
  constexpr int64_t kFewRows = 16;
  const bool by_tiles = !params.batch_invariant && task.row_end - task.row_begin > kFewRows;
  if (!by_tiles) return run_gemm_task<DotFloat32>(params, blocking, task, scratch);
  SplitGemmTaskRunner runner(params, blocking, task, scratch);
  if (runner.run()) return;
  run_gemm_task<DotFloat32>(params, blocking, task, scratch);
  runner.pack_all();
}

void run_float32_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                                      void* scratch) {
  const GatheredRows<float> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const float* weight = static_cast<const float*>(p.weight) + task.expert * p.weight_expert_stride;
  const GemmEpilogue<float> epilogue(p, task.expert);
  NanCheck nan;
  split_product(
      blocking, scratch, task.row_end - task.row_begin, p.in_features, task.col_begin, task.col_end,
      [&](SplitPacked left, int64_t num_rows, int64_t k, int64_t n) {
        SplitRows(left, num_rows, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); }).finish();
      },
      [&](int64_t k, int64_t col) { return weight + k * p.weight_row_stride + col; },
      [&](int64_t row, int64_t col, int64_t n, VecF sums) {
        nan.see(sums);
        epilogue.store(task.row_begin + row, col, n, sums, VecF{});
      });
  if (nan.found()) run_transposed_gemm_task<float>(p, blocking, task, scratch);
}

void run_float32_weight_grad_task(const GroupedWeightGradParams& p, const GemmBlocking& blocking,
                                  const WeightGradTask& task, void* scratch) {
  const GatheredRows<float> grads(p.grad_rows, p.grad_row_stride, p.grad_token_of_row, p.num_source_grad_rows);
  const GatheredRows<float> inputs(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  if (p.grad_weight == nullptr) return run_weight_grad_task<float>(p, blocking, task, scratch);
  float* out = static_cast<float*>(p.grad_weight) + task.expert * p.out_features * p.in_features;
  const bool stream = is_streamed<float>(p);
  NanCheck nan;
  split_product(
      blocking, scratch, task.row_end - task.row_begin, task.end - task.begin, task.col_begin, task.col_end,
      [&](SplitPacked left, int64_t num_rows, int64_t k, int64_t n) {
        split_left_across(left, num_rows, n, [&](int64_t i) { return grads.at(task.begin + k + i, task.row_begin); });
      },
      [&](int64_t i, int64_t col) { return inputs.at(task.begin + i, col); },
      [&](int64_t row, int64_t col, int64_t n, VecF sums) {
        nan.see(sums);
        float* to = out + (task.row_begin + row) * p.in_features + col;
        if (stream) return _mm512_stream_ps(to, sums);
        store_n(to, sums, n);
      });
  if (stream) _mm_sfence();
  if (nan.found()) return run_weight_grad_task<float>(p, blocking, task, scratch);
  if (p.grad_bias != nullptr && task.col_begin == 0) {
    sum_bias(p, task, grads, reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset));
  }
}

}  // namespace
}  // namespace moekernels::cpu
