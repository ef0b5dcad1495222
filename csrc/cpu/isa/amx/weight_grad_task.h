// One task of the weight gradient in bfloat16 by tile registers: grad_rows, transposed, on the left, rows on the right.
#pragma once

#include "cpu/isa/amx/product.h"
#include "cpu/isa/bias_grad.h"
#include "cpu/isa/non_temporal.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

void run_amx_weight_grad_task(const GroupedWeightGradParams& p, const GemmBlocking& blocking,
                              const WeightGradTask& task, void* scratch) {
  const GatheredRows<BFloat16> grads(p.grad_rows, p.grad_row_stride, p.grad_token_of_row, p.num_source_grad_rows);
  const GatheredRows<BFloat16> inputs(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  if (p.grad_bias != nullptr && task.col_begin == 0) {
    sum_bias(p, task, grads, reinterpret_cast<float*>(static_cast<char*>(scratch) + blocking.sums_offset));
  }
  if (p.grad_weight == nullptr) return;
  BFloat16* out = static_cast<BFloat16*>(p.grad_weight) + task.expert * p.out_features * p.in_features;
  const bool non_temporal = is_non_temporal<BFloat16>(p);
  amx_product(
      blocking, scratch, task.row_end - task.row_begin, task.end - task.begin, task.col_begin, task.col_end,
      [&](AmxPacked& left, int64_t num_rows, int64_t k, int64_t n) {
        left.pack_left_transposed(num_rows, n, [&](int64_t i) { return grads.at(task.begin + k + i, task.row_begin); });
      },
      [&](int64_t i, int64_t col) { return inputs.at(task.begin + i, col); },
      [&](int64_t row, int64_t col, int64_t n, VecF low, VecF high) {
        BFloat16* target = out + (task.row_begin + row) * p.in_features + col;
        if (n >= 2 * kLanes) {
          const __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
          if (non_temporal) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), line);
          return _mm512_storeu_si512(target, line);
        }
        store_n(target, low, n);
        if (n > kLanes) store_n(target + kLanes, high, n - kLanes);
      });
  if (non_temporal) _mm_sfence();
}

}  // namespace
}  // namespace moekernels::cpu
