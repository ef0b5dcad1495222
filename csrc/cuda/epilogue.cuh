// From sums to outputs, the same for every grouped GEMM: bias, activation, gate, row scale, rounding.
//
//   plain: out[row, c] = round(scale[row] * act(sum[c] + bias[c]))
//   gated: out[row, c] = round(scale[row] * (act(sum[c] + bias[c]) * (sum[F + c] + bias[F + c])))     F: output width
//
// All of it in float32, rounded once. The functions are accurate to a few units in the last place of float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dtype.cuh"
#include "moekernels/params.h"

namespace moekernels {

// ---- activations ----

// x / (1 + e^-y). Where e^-y overflows the result is 0 (NaN for x = -inf), as x * sigmoid(y) would be.
__device__ __forceinline__ float times_sigmoid(float x, float y) {
  return __fdividef(x, 1.0f + expf(-y));
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0f ? 0.0f : x;  // keeps NaN
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
    return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  } else if constexpr (kActivation == Activation::kSilu) {
    return times_sigmoid(x, x);
  } else {
    static_assert(kActivation == Activation::kNone);
    return x;
  }
}

// Calls body(std::integral_constant<Activation, ...>): one branch for a whole tile rather than one per element.
template <class Body>
__device__ __forceinline__ void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kNone:
      return body(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

// ---- operands ----

// The bias of one expert in float32; zero where there is none. `feature` counts weight rows: values start at F.
template <class T>
class Bias {
 public:
  __device__ __forceinline__ Bias(const GroupedGemmParams& p, int32_t expert)
      : bias_(p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + expert * p.bias_stride) {}

  __device__ __forceinline__ float operator[](int64_t feature) const {
    return bias_ == nullptr ? 0.0f : to_float(bias_[feature]);
  }

 private:
  const T* bias_;
};

__device__ __forceinline__ float row_scale(const GroupedGemmParams& p, int64_t row) {
  return p.row_scale == nullptr ? 1.0f : p.row_scale[row];
}

// ---- outputs ----

// Rounds kCount neighbouring columns of a row and stores them: 16 bytes at a time where `aligned` says that rows of the
// output may be written so, and only the columns left of `width`. `col` is a multiple of kCount.
template <class T, int kCount>
__device__ __forceinline__ void store_columns(T* row, int64_t col, int64_t width, bool aligned,
                                              const float (&values)[kCount]) {
  constexpr int kVec = Vec16<T>::kSize;
  static_assert(kCount % kVec == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kVec) {
    Vec16<T> rounded;
#pragma unroll
    for (int j = 0; j < kVec; ++j) rounded.values[j] = from_float<T>(values[i + j]);
    if (aligned && col + i < width) {  // width is a multiple of kVec then
      store_vec16(row + col + i, rounded);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (col + i + j < width) row[col + i + j] = rounded.values[j];
      }
    }
  }
}

}  // namespace moekernels
