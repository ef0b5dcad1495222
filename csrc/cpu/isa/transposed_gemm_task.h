// One task of the grouped GEMM with a transposed weight, which is MN-major: rows on the left, the weight on the
// right.
#pragma once

#include "cpu/isa/expert_weight.h"
#include "cpu/isa/gathered_rows.h"
#include "cpu/isa/gemm_epilogue.h"
#include "cpu/isa/streamed_product.h"

namespace moekernels::cpu {
namespace {

template <class T>
void run_transposed_gemm_task(const GroupedGemmParams& p, const GemmBlocking& blocking, const GemmTask& task,
                              void* scratch) {
  const GatheredRows<T> rows(p.rows, p.row_stride, p.token_of_row, p.num_source_rows);
  const TransposedWeight<T> weight(p, task.expert);
  const GemmEpilogue<T> epilogue(p, task);
  using Outer = typename OuterOf<T>::Type;
  const int64_t num_rows = task.row_end - task.row_begin;
  const auto pack = [&](OuterLeft<Outer>& left, int64_t count, int64_t k, int64_t n) {
    left.pack(count, n, [&](int64_t row) { return rows.at(task.row_begin + row, k); });
  };
  const auto right_row = [&](int64_t k, int64_t col) { return weight.row(k) + col; };
  const auto finish = [&](int64_t row, int64_t col, int64_t n, const float* sums) {
    for (int64_t c = 0; c < n; c += kLanes) {
      epilogue.store(task.row_begin + row, col + c, n - c, load(sums + c), VecF{});
    }
  };
  if (num_rows <= kStreamedRows) {
    streamed_product<T>(blocking, scratch, num_rows, p.in_features, task.col_begin, task.col_end, pack, right_row,
                        finish);
  } else {
    outer_product<Outer>(blocking, scratch, num_rows, p.in_features, task.col_begin, task.col_end, pack, right_row,
                         finish);
  }
}

}  // namespace
}  // namespace moekernels::cpu
