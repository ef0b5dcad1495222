// One task of the weight gradient: grad_rows, transposed, on the left, rows on the right. Both lie as outer products
// want them.
#pragma once

#include "cpu/isa/bias_grad.h"
#include "cpu/isa/outer_product.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

template <class T>
void run_weight_grad_task(const GroupedWeightGradParams& p, const GemmBlocking& blocking, const WeightGradTask& task,
                          void* scratch) {
  const GatheredRows<T> grads(p.grad_rows, p.grad_row_stride, p.grad_token_of_row, p.num_source_grad_rows);
  const GatheredRows<T> inputs(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  if (p.grad_bias != nullptr && task.col_begin == 0) {
    sum_bias(p, task, grads, reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset));
  }
  if (p.grad_weight == nullptr) return;
  T* out = static_cast<T*>(p.grad_weight) + task.expert * p.out_features * p.in_features;
  using Outer = typename OuterOf<T>::Type;
  outer_product<Outer>(
      blocking, scratch, task.row_end - task.row_begin, task.end - task.begin, task.col_begin, task.col_end,
      [&](OuterLeft<Outer>& left, int64_t num_rows, int64_t k, int64_t n) {
        left.pack_transposed(num_rows, n, [&](int64_t i) { return grads.at(task.begin + k + i, task.row_begin); });
      },
      [&](int64_t i, int64_t col) { return inputs.at(task.begin + i, col); },
      [&](int64_t row, int64_t col, int64_t n, const float* sums) {
        T* const target = out + (task.row_begin + row) * p.in_features + col;
        for (int64_t c = 0; c < n; c += kLanes) store_n(target + c, load(sums + c), n - c);
      });
}

}  // namespace
}  // namespace moekernels::cpu
