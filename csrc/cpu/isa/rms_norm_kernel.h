// Root-mean-square normalisation, one row after the other. Which rows come together makes no difference to any.
#pragma once

#include "cpu/isa/simd.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

template <class T>
void rms_norm_of_rows(const RmsNormParams& p, int64_t row_begin, int64_t row_end) {
  constexpr int kSums = 4;  // so that one addition need not wait for the last
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* input = static_cast<const T*>(p.input) + row * p.hidden_size;
    T* out = static_cast<T*>(p.out) + row * p.hidden_size;
    VecF sums[kSums] = {};
    int64_t c = 0;
    for (; c + kSums * kLanes <= p.hidden_size; c += kSums * kLanes) {
      MOEKERNELS_UNROLL
      for (int v = 0; v < kSums; ++v) {
        const VecF x = load(input + c + v * kLanes);
        sums[v] = fma(x, x, sums[v]);
      }
    }
    for (; c < p.hidden_size; c += kLanes) {
      const VecF x = load_n(input + c, p.hidden_size - c);
      sums[0] = fma(x, x, sums[0]);
    }
    const float mean = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(p.hidden_size);
    const float factor = 1.0f / __builtin_sqrtf(mean + p.eps);
    for (c = 0; c < p.hidden_size; c += kLanes) {
      const int64_t n = p.hidden_size - c;
      store_n(out + c, load_n(weight + c, n) * (factor * load_n(input + c, n)), n);
    }
  }
}

void rms_norm(const RmsNormParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return rms_norm_of_rows<float>(p, row_begin, row_end);
    case DType::kBFloat16:
      return rms_norm_of_rows<BFloat16>(p, row_begin, row_end);
    case DType::kFloat16:
      return rms_norm_of_rows<Float16>(p, row_begin, row_end);
  }
}

}  // namespace
}  // namespace moekernels::cpu
