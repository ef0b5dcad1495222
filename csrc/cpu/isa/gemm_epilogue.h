// What becomes of a finished sum of the grouped GEMM: bias, activation, gate, scale, rounding.
#pragma once

#include "cpu/isa/vector_math.h"
#include "cpu/kernel_table.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

template <class T>
class GemmEpilogue {
 public:
  GemmEpilogue(const GroupedGemmParams& params, const GemmTask& task)
      : p_(params),
        width_(params.gated ? params.out_features / 2 : params.out_features),
        first_column_(task.col_begin),
        bias_(bias(task.expert, task.col_begin)),
        value_bias_(params.gated ? bias(task.expert, width_ + task.col_begin) : nullptr) {}

  // Elements column .. column + n (at most a vector) of an output row; `value` counts only where the weight is gated.
  MOEKERNELS_INLINE void store(int64_t row, int64_t column, int64_t n, VecF x, VecF value) const {
    if (bias_ != nullptr) {
      x += load_n(bias_ + (column - first_column_), n);
      if (p_.gated) value += load_n(value_bias_ + (column - first_column_), n);
    }
    x = activated(x, value);
    if (p_.row_scale != nullptr) x *= p_.row_scale[row];
    store_n(out(row, column), x, n);
  }

  // The same of rows row .. row + n (at most a vector) in one column, with their scales.
  MOEKERNELS_INLINE VecF column(int64_t column, VecF x, VecF value, VecF scales) const {
    if (bias_ != nullptr) {
      x += widened(bias_[column - first_column_]);
      if (p_.gated) value += widened(value_bias_[column - first_column_]);
    }
    x = activated(x, value);
    return p_.row_scale != nullptr ? x * scales : x;
  }
  VecF row_scales(int64_t row, int64_t n) const {
    return p_.row_scale == nullptr ? VecF{} : load_n(p_.row_scale + row, n);
  }

  int64_t width() const { return width_; }  // of an output row

  MOEKERNELS_INLINE T* out(int64_t row, int64_t column) const {
    return static_cast<T*>(p_.out) + row * width_ + column;
  }

 private:
  MOEKERNELS_INLINE VecF activated(VecF x, VecF value) const {
    if (p_.activation == Activation::kSwiglu) return swiglu(p_.swiglu, x, value);
    x = activate(p_.activation, x);
    return p_.gated ? x * value : x;
  }

  // The bias from a weight row on, to the end of its part; null where there is none.
  const T* bias(int64_t expert, int64_t row) const {
    if (p_.bias_parts != nullptr) {
      const int64_t part_rows = p_.out_features / p_.num_parts;
      return static_cast<const T*>(p_.bias_parts[expert * p_.num_parts + row / part_rows]) + row % part_rows;
    }
    return p_.bias == nullptr ? nullptr : static_cast<const T*>(p_.bias) + expert * p_.bias_stride + row;
  }

  const GroupedGemmParams& p_;
  const int64_t width_;
  const int64_t first_column_;  // of the task, whose columns lie in one part of the bias
  const T* const bias_;
  const T* const value_bias_;
};

}  // namespace
}  // namespace moekernels::cpu
