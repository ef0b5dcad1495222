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
        grads_(scratch, task.row_end - task.row_begin),
        columns_(reinterpret_cast<Weight*>(static_cast<char*>(scratch) + blocking.weights_offset)),
        sums_(reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset)) {}

  void run() {
    if (p_.grad_bias != nullptr && task_.col_begin == 0) sum_bias();
    if (p_.grad_weight == nullptr) return;
    const bool pack_once = num_rows_ <= blocking_.depth;
    if (pack_once) pack(0, num_rows_);
    for (int64_t col = task_.col_begin; col < task_.col_end; col += blocking_.cols) {
      const int64_t cols = smaller(blocking_.cols, task_.col_end - col);
      const int64_t stride = rounded_up(cols, kTileCols);
      if (num_rows_ == 0) clear_sums(grads_.rows() * stride);
      for (int64_t i = 0; i < num_rows_; i += blocking_.depth) {
        const int64_t n = smaller(blocking_.depth, num_rows_ - i);
        if (!pack_once) pack(i, n);
        multiply(col, cols, stride, i, n);
      }
      finish(col, cols, stride);
    }
  }

 private:
  static const Weight* row(const void* matrix, int64_t stride, const int32_t* token_of_row, int64_t num_source_rows,
                           int64_t index) {
    if (token_of_row != nullptr) {
      index = token_of_row[index];
      if (index < 0 || index >= num_source_rows) return nullptr;
    }
    return static_cast<const Weight*>(matrix) + index * stride;
  }

  // Row i of the expert from column `col` on; null: zeros.
  const Weight* grad_row(int64_t i, int64_t col) const {
    const Weight* found =
        row(p_.grad_rows, p_.grad_row_stride, p_.grad_token_of_row, p_.num_source_grad_rows, task_.begin + i);
    return found == nullptr ? nullptr : found + col;
  }
  const Weight* input_row(int64_t i, int64_t col) const {
    const Weight* found = row(p_.rows, p_.row_stride, p_.token_of_row, p_.num_source_rows, task_.begin + i);
    return found == nullptr ? nullptr : found + col;
  }

  void pack(int64_t begin, int64_t n) {
    grads_.pack_transposed([&](int64_t i) { return grad_row(begin + i, task_.row_begin); }, n);
  }

  void multiply(int64_t col, int64_t cols, int64_t stride, int64_t begin, int64_t depth) {
    TileOperands<Dot> t;
    t.sums_stride = stride;
    for (int64_t k = 0; k < depth; k += Dot::kChunk) {
      const int64_t n = smaller(Dot::kChunk, depth - k);
      transpose_rows([&](int64_t i) { return input_row(begin + k + i, col); }, n, cols, columns_,
                     blocking_.weights_stride);
      t.n = rounded_up(n, Dot::kStep);
      t.add = begin + k > 0;
      for (int64_t first = 0; first < cols; first += kTileCols) {
        for (int64_t c = 0; c < kTileCols; ++c) {
          t.weight[c] = columns_ + smaller(first + c, cols - 1) * blocking_.weights_stride;
        }
        multiply_panel(grads_, k, sums_ + first, {}, t);
      }
    }
  }

  void finish(int64_t col, int64_t cols, int64_t stride) const {
    for (int64_t r = 0; r < grads_.rows(); ++r) {
      const int64_t out_row = task_.expert * p_.out_features + task_.row_begin + r;
      Weight* out = static_cast<Weight*>(p_.grad_weight) + out_row * p_.in_features + col;
      for (int64_t c = 0; c < cols; c += kLanes) store_n(out + c, load_n(sums_ + r * stride + c, cols - c), cols - c);
    }
  }

  void sum_bias() {
    const int64_t n = grads_.rows();
    clear_sums(n);
    for (int64_t i = 0; i < num_rows_; ++i) {
      const Weight* grad = grad_row(i, task_.row_begin);
      if (grad == nullptr) continue;
      const VecF scale = set1(p_.bias_scale == nullptr ? 1.0f : p_.bias_scale[task_.begin + i]);
      for (int64_t c = 0; c < n; c += kLanes) {
        store_n(sums_ + c, fma(scale, load_n(grad + c, n - c), load_n(sums_ + c, n - c)), n - c);
      }
    }
    Weight* out = static_cast<Weight*>(p_.grad_bias) + task_.expert * p_.out_features + task_.row_begin;
    for (int64_t c = 0; c < n; c += kLanes) store_n(out + c, load_n(sums_ + c, n - c), n - c);
  }

  void clear_sums(int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums_[i] = 0.0f;
  }

  const GroupedWeightGradParams& p_;
  const GemmBlocking& blocking_;
  const WeightGradTask& task_;
  const int64_t num_rows_;
  PackedRows<Dot> grads_;
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
