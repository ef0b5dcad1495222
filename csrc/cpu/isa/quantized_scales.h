// The scales of rows of a quantised weight, in float32.
#pragma once

#include "cpu/isa/fetch_ahead.h"
#include "cpu/isa/parts.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

constexpr int kNestedGroup = 256;

class QuantizedScales {
 public:
  QuantizedScales(const QuantizedGemmParams& params, int64_t expert)
      : w_(params.weight), expert_(expert), per_row_(params.gemm.in_features / params.weight.group) {}

  int64_t per_row() const { return per_row_; }

  void fetch_row(int64_t row) const {
    const int64_t size = w_.map != nullptr ? 1 : w_.scales_dtype == DType::kFloat16 ? 2 : 4;
    const char* scales = static_cast<const char*>(w_.scales) + expert_ * w_.scales_stride * size;
    fetch_ahead(scales + row * per_row_ * size, per_row_ * size);
  }

  // Those of a row, times `unit`.
  void load_row(int64_t row, float unit, float* target) const {
    const int64_t first = row * per_row_;
    unit *= w_.unit;
    if (w_.map != nullptr) {
      const auto* codes = static_cast<const uint8_t*>(w_.scales) + expert_ * w_.scales_stride + first;
      const float* nested = w_.nested + expert_ * w_.nested_stride;
      const float* offset = w_.offset + expert_ * w_.nested_stride;
      for (int64_t i = 0; i < per_row_; ++i) {
        const int64_t group = (first + i) / kNestedGroup;
        target[i] = (w_.map[codes[i]] * nested[group] + offset[group]) * unit;
      }
    } else if (w_.scales_dtype == DType::kFloat16) {
      widen(static_cast<const Float16*>(w_.scales) + expert_ * w_.scales_stride + first, unit, target);
    } else {
      widen(static_cast<const float*>(w_.scales) + expert_ * w_.scales_stride + first, unit, target);
    }
  }

 private:
  template <class T>
  void widen(const T* scales, float unit, float* target) const {
    for (int64_t i = 0; i < per_row_; i += kLanes)
      store_n(target + i, load_n(scales + i, per_row_ - i) * unit, per_row_ - i);
  }

  const QuantizedWeightParams& w_;
  const int64_t expert_;
  const int64_t per_row_;
};

}  // namespace
}  // namespace moekernels::cpu
