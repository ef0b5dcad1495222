// The weight of one expert, which is a matrix of a stack or comes in several parts whose rows follow one another.
#pragma once

#include "cpu/isa/simd.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// A row of an expert's weight, and the distance to the next one of its part.
template <class T>
struct WeightRow {
  const T* data;
  int64_t stride;
};

template <class T>
WeightRow<T> weight_row(const GroupedGemmParams& p, int64_t expert, int64_t row) {
  if (p.weight_parts == nullptr) {
    const T* weight = static_cast<const T*>(p.weight) + expert * p.weight_expert_stride;
    return {weight + row * p.weight_row_stride, p.weight_row_stride};
  }
  int64_t index = 0;
  if (p.num_parts > 1) {
    const int64_t part_rows = (p.transposed ? p.in_features : p.out_features) / p.num_parts;
    index = row / part_rows;
    row %= part_rows;
  }
  const WeightPart& part = p.weight_parts[expert * p.num_parts + index];
  return {static_cast<const T*>(part.data) + row * part.row_stride, part.row_stride};
}

// The weight rows of a task's columns and, gated, those of their values. Each lie in one part, as tasks are cut so.
template <class T>
class TaskWeight {
 public:
  TaskWeight(const GroupedGemmParams& p, const GemmTask& task)
      : first_column_(task.col_begin),
        rows_{weight_row<T>(p, task.expert, task.col_begin),
              weight_row<T>(p, task.expert, task.col_begin + (p.gated ? p.out_features / 2 : 0))} {}

  MOEKERNELS_INLINE const T* row(int64_t column, bool value) const {
    return rows_[value].data + (column - first_column_) * rows_[value].stride;
  }
  int64_t stride(bool value) const { return rows_[value].stride; }

 private:
  const int64_t first_column_;
  const WeightRow<T> rows_[2];
};

// An MN-major weight: row k, which may be in any part.
template <class T>
class TransposedWeight {
 public:
  TransposedWeight(const GroupedGemmParams& p, int64_t expert)
      : p_(p), expert_(expert), one_part_(p.weight_parts == nullptr || p.num_parts == 1) {
    if (one_part_) first_ = weight_row<T>(p, expert, 0);
  }

  MOEKERNELS_INLINE const T* row(int64_t k) const {
    return one_part_ ? first_.data + k * first_.stride : weight_row<T>(p_, expert_, k).data;
  }

 private:
  const GroupedGemmParams& p_;
  const int64_t expert_;
  const bool one_part_;
  WeightRow<T> first_{};
};

}  // namespace
}  // namespace moekernels::cpu
