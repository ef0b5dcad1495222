// The rows of a matrix, as they lie in memory or gathered through an index.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

template <class T>
class GatheredRows {
 public:
  // `token_of_row` may be null: row i is row i of the matrix. A row whose token is outside [0, num_source_rows) is null
  // and counts as zeros.
  GatheredRows(const void* matrix, int64_t stride, const int32_t* token_of_row, int64_t num_source_rows)
      : matrix_(static_cast<const T*>(matrix)),
        stride_(stride),
        token_of_row_(token_of_row),
        num_source_rows_(num_source_rows) {}

  // Row `row` from column `col` on.
  MOEKERNELS_INLINE const T* at(int64_t row, int64_t col) const {
    if (token_of_row_ != nullptr) {
      row = token_of_row_[row];
      if (row < 0 || row >= num_source_rows_) return nullptr;
    }
    return matrix_ + row * stride_ + col;
  }

 private:
  const T* matrix_;
  int64_t stride_;
  const int32_t* token_of_row_;
  int64_t num_source_rows_;
};

}  // namespace
}  // namespace moekernels::cpu
