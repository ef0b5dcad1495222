// Tasks of the grouped GEMM and of the weight gradient in float32 by tile registers (amx/split.h). One with so few rows
// that a weight is multiplied as fast as it is split streams its weights by vector instructions (gemm_task.h).
//
// A weight is K-major, so weights are the left operand of the grouped GEMM and the few rows of the task the right
// one: sums come out as [columns][rows] and are transposed when they are finished. Where the weight is MN-major, and
// in the weight gradient, rows are on the left.
#pragma once

#include "cpu/isa/amx/split_product.h"
#include "cpu/isa/amx/split_stream.h"
#include "cpu/isa/bias_grad.h"
#include "cpu/isa/dot.h"
#include "cpu/isa/expert_weight.h"
#include "cpu/isa/gathered_rows.h"
#include "cpu/isa/gemm_epilogue.h"
#include "cpu/isa/gemm_task.h"
#include "cpu/isa/non_temporal.h"
#include "cpu/isa/transposed_gemm_task.h"
#include "cpu/isa/weight_grad_task.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

class SplitGemmTaskRunner {
 public:
  SplitGemmTaskRunner(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                      void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        weight_(params, task),
        source_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        epilogue_(params, task),
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
    const int64_t block = pack_once_ ? task_.col_end - task_.col_begin : blocking_.cols;
    for (int64_t col = task_.col_begin; col < task_.col_end; col += block) {
      for (int64_t k = 0; k < p_.in_features; k += blocking_.depth) {
        const int64_t n = min(blocking_.depth, p_.in_features - k);
        if (!pack_once_) pack(k, n);
        multiply(col, min(block, task_.col_end - col), k, n);
      }
    }
    return !nan_.found();
  }

  // The next task may count on it.
  void pack_all() {
    if (pack_once_) pack(0, p_.in_features);
  }

 private:
  void pack(int64_t k, int64_t n) {
    split_right(SplitPacked(rows_, n), num_rows_, n, [&](int64_t row) { return source_.at(task_.row_begin + row, k); });
  }

  // Columns col .. col + cols over elements k .. k + n, all that are packed. Those that get their last elements are
  // finished while they are in the cache; where there are more to come, the sums of all of them wait.
  void multiply(int64_t col, int64_t cols, int64_t k, int64_t n) {
    const SplitPacked rows(rows_, n);
    const int64_t weights = p_.gated ? 2 : 1;  // of a column: its gate, then its value
    SplitStream stream(weights_, weights * groups_of(cols), n, [this, weights, col, cols, k](int64_t group, int64_t i) {
      const int64_t column = col + min(group / weights * kAmxRows + i, cols - 1);  // past the last one it repeats
      return weight_.row(column, group % weights == 1) + k;
    });
    for (int64_t c = 0; c < cols; c += kAmxRows) {
      float* const sums = sums_ + (pack_once_ ? 0 : c / kAmxRows * weights * row_groups_ * kAmxSums);
      for (int64_t i = 0; i < weights; ++i) {
        multiply_group(stream, row_groups_, rows, sums + i * row_groups_ * kAmxSums, k > 0);
      }
      if (k + n == p_.in_features) finish(sums, col + c, cols - c);
    }
  }

  // A group of columns, or the n that are left.
  void finish(const float* tile, int64_t column, int64_t n) {
    for (int64_t first = 0; first < num_rows_; first += kAmxRows, tile += kAmxSums) {
      VecU sums[kAmxRows], values[kAmxRows] = {};
      load_transposed(tile, sums);
      if (p_.gated) load_transposed(tile + row_groups_ * kAmxSums, values);
      for (int64_t row = 0; row < min(kAmxRows, num_rows_ - first); ++row) {
        nan_.see(VecF(sums[row]));
        nan_.see(VecF(values[row]));
        epilogue_.store(task_.row_begin + first + row, column, n, VecF(sums[row]), VecF(values[row]));
      }
    }
  }

  static MOEKERNELS_INLINE void load_transposed(const float* tile, VecU (&v)[kAmxRows]) {
    MOEKERNELS_UNROLL
    for (int i = 0; i < kAmxRows; ++i) v[i] = VecU(load(tile + i * kAmxRows));
    transpose(v);
  }

  const GroupedGemmParams& p_;
  const GemmBlocking& blocking_;
  const GemmTask& task_;
  const TaskWeight<float> weight_;
  const GatheredRows<float> source_;
  const GemmEpilogue<float> epilogue_;
  void* const rows_;
  BFloat16* const weights_;  // tiles of SplitStream
  float* const sums_;        // [groups of columns][gate, value][groups of rows] tiles
  const int64_t num_rows_, row_groups_;
  const bool pack_once_;
  NanCheck nan_;
};

// By its rows alone, unless a row's bits may not depend on how many others its expert has.
void run_float32_gemm_task(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                           void* scratch) {
  const bool few_rows = task.row_end - task.row_begin <= DotFloat32::kTileRows;  // of a tile of the vector kernel
  const bool by_vectors = few_rows || params.batch_invariant || params.in_features == 0;
  if (by_vectors) return run_gemm_task<DotFloat32>(params, blocking, task, scratch);
  SplitGemmTaskRunner runner(params, blocking, task, scratch);
  if (runner.run()) return;
  GemmTask again = task;
  again.rows_packed = false;  // not as vectors need them
  run_gemm_task<DotFloat32>(params, blocking, again, scratch);
  runner.pack_all();
}

void run_float32_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                                      void* scratch) {
  const GatheredRows<float> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const TransposedWeight<float> weight(p, task.expert);
  const GemmEpilogue<float> epilogue(p, task);
  NanCheck nan;
  split_product(
      blocking, scratch, task.row_end - task.row_begin, p.in_features, task.col_begin, task.col_end,
      [&](SplitPacked left, int64_t num_rows, int64_t k, int64_t n) {
        split_left(left, num_rows, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); });
      },
      [&](int64_t k, int64_t col) { return weight.row(k) + col; },
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
  const bool non_temporal = is_non_temporal<float>(p);
  NanCheck nan;
  split_product(
      blocking, scratch, task.row_end - task.row_begin, task.end - task.begin, task.col_begin, task.col_end,
      [&](SplitPacked left, int64_t num_rows, int64_t k, int64_t n) {
        split_left_mn_major(left, num_rows, n, [&](int64_t i) { return grads.at(task.begin + k + i, task.row_begin); });
      },
      [&](int64_t i, int64_t col) { return inputs.at(task.begin + i, col); },
      [&](int64_t row, int64_t col, int64_t n, VecF sums) {
        nan.see(sums);
        float* to = out + (task.row_begin + row) * p.in_features + col;
        if (non_temporal) return _mm512_stream_ps(to, sums);
        store_n(to, sums, n);
      });
  if (non_temporal) _mm_sfence();
  if (nan.found()) return run_weight_grad_task<float>(p, blocking, task, scratch);
  if (p.grad_bias != nullptr && task.col_begin == 0) {
    sum_bias(p, task, grads, reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset));
  }
}

}  // namespace
}  // namespace moekernels::cpu
