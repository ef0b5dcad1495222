// What becomes of a finished sum of the grouped GEMM: bias, activation, gate, scale, rounding.
#pragma once

#include "moekernels/params.h"
#include "vector_math.h"

namespace moekernels::cpu {
namespace {

template <class T>
class GemmEpilogue {
 public:
  GemmEpilogue(const GroupedGemmParams& params, int64_t expert)
      : p_(params),
        bias_(params.bias == nullptr ? nullptr : static_cast<const T*>(params.bias) + expert * params.bias_stride),
        width_(params.gated ? params.out_features / 2 : params.out_features) {}

  // Elements column .. column + n (at most a vector) of an output row; `value` counts only where the weight is gated.
  MOEKERNELS_INLINE void store(int64_t row, int64_t column, int64_t n, VecF x, VecF value) const {
    if (bias_ != nullptr) {
      x += load_n(bias_ + column, n);
      if (p_.gated) value += load_n(bias_ + width_ + column, n);
    }
    x = activated(x, value);
    if (p_.row_scale != nullptr) x *= p_.row_scale[row];
    store_n(out(row, column), x, n);
  }

  // The same of rows row .. row + n (at most a vector) in one column, with their scales.
  MOEKERNELS_INLINE VecF column(int64_t column, VecF x, VecF value, VecF scales) const {
    if (bias_ != nullptr) {
      x += widened(bias_[column]);
      if (p_.gated) value += widened(bias_[width_ + column]);
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
    x = activate(p_.activation, x);
    return p_.gated ? x * value : x;
  }

  const GroupedGemmParams& p_;
  const T* const bias_;
  const int64_t width_;
};

}  // namespace
}  // namespace moekernels::cpu
