// The gradient of a bias: a scaled sum of rows, in order.
#pragma once

#include "cpu/isa/gathered_rows.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// For the task's rows of the gradient, which are columns of grad_rows; `sums` has room for them.
template <class T>
void sum_bias(const GroupedWeightGradParams& p, const WeightGradTask& task, const GatheredRows<T>& grads, float* sums) {
  const int64_t n = task.row_end - task.row_begin;
  for (int64_t c = 0; c < n; ++c) sums[c] = 0.0f;
  for (int64_t i = task.begin; i < task.end; ++i) {
    const T* grad = grads.at(i, task.row_begin);
    if (grad == nullptr) continue;
    const VecF scale = set1(p.bias_scale == nullptr ? 1.0f : p.bias_scale[i]);
    for (int64_t c = 0; c < n; c += kLanes) {
      store_n(sums + c, fma(scale, load_n(grad + c, n - c), load_n(sums + c, n - c)), n - c);
    }
  }
  T* out = static_cast<T*>(p.grad_bias) + task.expert * p.out_features + task.row_begin;
  for (int64_t c = 0; c < n; c += kLanes) store_n(out + c, load_n(sums + c, n - c), n - c);
}

}  // namespace
}  // namespace moekernels::cpu
