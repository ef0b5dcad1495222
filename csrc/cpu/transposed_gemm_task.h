// One task of the grouped GEMM with a transposed weight, whose rows lie across K: rows on the left, the weight on the
// right.
#pragma once

#include "gathered_rows.h"
#include "gemm_epilogue.h"
#include "outer_product.h"

namespace moekernels::cpu {
namespace {

template <class T>
void run_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                              void* scratch) {
  const GatheredRows<T> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const T* weight = static_cast<const T*>(p.weight) + task.expert * p.weight_expert_stride;
  const GemmEpilogue<T> epilogue(p, task.expert);
  outer_product(
      blocking, scratch, task.row_end - task.row_begin, p.in_features, task.col_begin, task.col_end,
      [&](OuterLeft& left, int64_t num_rows, int64_t k, int64_t n) {
        left.pack(num_rows, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); });
      },
      [&](int64_t k, int64_t col) { return weight + k * p.weight_row_stride + col; },
      [&](int64_t row, int64_t col, int64_t n, VecF sums) {
        epilogue.store(task.row_begin + row, col, n, sums, VecF{});
      });
}

}  // namespace
}  // namespace moekernels::cpu
