// The scales of rows of a quantised weight, in float32.
#pragma once

#include "cpu/isa/fetch_ahead.h"
#include "cpu/isa/parts.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

constexpr int kNestedGroup = 256;
constexpr int64_t kBytesAhead = 8 * 1024;  // of codes, fetched before they are needed

class QuantizedScales {
 public:
  QuantizedScales(const QuantizedGemmParams& params, int64_t expert)
      : w_(params.weight), expert_(expert), per_row_(params.gemm.in_features / params.weight.group) {}

  int64_t per_row() const { return per_row_; }

  // Weight k of a row has scale k >> group_shift().
  int group_shift() const {
    if (per_row_ == 1) return 62;
    int shift = 0;
    while (int64_t{1} << shift < w_.group) ++shift;
    return shift;
  }

  void fetch_rows(int64_t row, int64_t rows) const {
    const int64_t size = w_.map != nullptr ? 1 : w_.scales_dtype == DType::kFloat16 ? 2 : 4;
    const char* scales = static_cast<const char*>(w_.scales) + expert_ * w_.scales_stride * size;
    fetch_ahead(scales + row * per_row_ * size, rows * per_row_ * size);
  }

  // Those of some rows, times `unit`.
  void load_rows(int64_t row, int64_t rows, float unit, float* target) const {
    const int64_t first = row * per_row_, n = rows * per_row_;
    unit *= w_.unit;
    if (w_.map != nullptr) {
      const auto* codes = static_cast<const uint8_t*>(w_.scales) + expert_ * w_.scales_stride + first;
      const float* nested = w_.nested + expert_ * w_.nested_stride;
      const float* offset = w_.offset + expert_ * w_.nested_stride;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t group = (first + i) / kNestedGroup;
        target[i] = (w_.map[codes[i]] * nested[group] + offset[group]) * unit;
      }
    } else if (w_.scales_dtype == DType::kFloat16) {
      widen(static_cast<const Float16*>(w_.scales) + expert_ * w_.scales_stride + first, n, unit, target);
    } else {
      widen(static_cast<const float*>(w_.scales) + expert_ * w_.scales_stride + first, n, unit, target);
    }
  }

 private:
  template <class T>
  static void widen(const T* scales, int64_t n, float unit, float* target) {
    for (int64_t i = 0; i < n; i += kLanes) store_n(target + i, load_n(scales + i, n - i) * unit, n - i);
  }

  const QuantizedWeightParams& w_;
  const int64_t expert_;
  const int64_t per_row_;
};

}  // namespace
}  // namespace moekernels::cpu
