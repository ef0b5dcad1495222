// One task of the weight gradient: a block of one expert's gradient, summed over that expert's rows.
//
//   transpose and pack the block's columns of grad_rows        the tiles of multiply_tile
//   for each block of columns                                  whose sums stay in the second-level cache
//     for each chunk of rows
//       transpose the block's columns of rows                  the weights of multiply_tile
//       for each panel of 4 columns, for each tile             multiply_tile
//     round and store
//
// Where an expert has so many rows that the packed ones would not fit, each block of columns packs them in several
// parts.
#pragma once

#include "bias_grad.h"
#include "gemm_pack.h"
#include "kernel_table.h"

namespace moekernels::cpu {
namespace {

template <class Dot>
class WeightGradTaskRunner {
 public:
  using Weight = typename Dot::Weight;

  WeightGradTaskRunner(const GroupedWeightGradParams& params, const GemmBlocking& blocking, const WeightGradTask& task,
                       void* scratch)
      : p_(params),
        blocking_(blocking),
        task_(task),
        num_rows_(task.end - task.begin),
        grads_(params.grad_rows, params.grad_row_stride, params.grad_token_of_row, params.num_source_grad_rows),
        inputs_(params.rows, params.row_stride, params.token_of_row, params.num_source_rows),
        rows_(scratch, task.row_end - task.row_begin),
        columns_(reinterpret_cast<Weight*>(static_cast<char*>(scratch) + blocking.weights_offset)),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)) {}

  void run() {
    if (p_.grad_bias != nullptr && task_.col_begin == 0) sum_bias(p_, task_, grads_, sums_);
    if (p_.grad_weight == nullptr) return;
    const bool pack_once = num_rows_ <= blocking_.depth;
    if (pack_once) pack(0, num_rows_);
    for (int64_t col = task_.col_begin; col < task_.col_end; col += blocking_.cols) {
      const int64_t cols = smaller(blocking_.cols, task_.col_end - col);
      const int64_t stride = rounded_up(cols, kTileCols);
      if (num_rows_ == 0) clear_sums(rows_.rows() * stride);
      for (int64_t i = 0; i < num_rows_; i += blocking_.depth) {
        const int64_t n = smaller(blocking_.depth, num_rows_ - i);
        if (!pack_once) pack(i, n);
        multiply(col, cols, stride, i, n);
      }
      finish(col, cols, stride);
    }
  }

 private:
  void pack(int64_t begin, int64_t n) {
    rows_.pack_transposed([&](int64_t i) { return grads_.at(task_.begin + begin + i, task_.row_begin); }, n);
  }

  void multiply(int64_t col, int64_t cols, int64_t stride, int64_t begin, int64_t depth) {
    TileOperands<Dot> t;
    t.sums_stride = stride;
    for (int64_t k = 0; k < depth; k += Dot::kChunk) {
      const int64_t n = smaller(Dot::kChunk, depth - k);
      transpose_rows([&](int64_t i) { return inputs_.at(task_.begin + begin + k + i, col); }, n, cols, columns_,
                     blocking_.weights_stride);
      t.n = rounded_up(n, Dot::kStep);
      t.add = begin + k > 0;
      for (int64_t first = 0; first < cols; first += kTileCols) {
        for (int64_t c = 0; c < kTileCols; ++c) {
          t.weight[c] = columns_ + smaller(first + c, cols - 1) * blocking_.weights_stride;
        }
        multiply_panel(rows_, k, sums_ + first, {}, t);
      }
    }
  }

  void finish(int64_t col, int64_t cols, int64_t stride) const {
    for (int64_t r = 0; r < rows_.rows(); ++r) {
      const int64_t out_row = task_.expert * p_.out_features + task_.row_begin + r;
      Weight* out = static_cast<Weight*>(p_.grad_weight) + out_row * p_.in_features + col;
      for (int64_t c = 0; c < cols; c += kLanes) store_n(out + c, load_n(sums_ + r * stride + c, cols - c), cols - c);
    }
  }

  void clear_sums(int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums_[i] = 0.0f;
  }

  const GroupedWeightGradParams& p_;
  const GemmBlocking& blocking_;
  const WeightGradTask& task_;
  const int64_t num_rows_;
  const GatheredRows<Weight> grads_, inputs_;
  PackedRows<Dot> rows_;   // columns of grad_rows: rows of the gradient
  Weight* const columns_;  // [columns][weights_stride] of the current chunk of rows
  float* const sums_;      // [rows][columns] of the current columns
};

template <class Dot>
void run_weight_grad_task(const GroupedWeightGradParams& params, const GemmBlocking& blocking,
                          const WeightGradTask& task, void* scratch) {
  WeightGradTaskRunner<Dot>(params, blocking, task, scratch).run();
}

}  // namespace
}  // namespace moekernels::cpu
