// From sums to outputs, the same for every grouped GEMM: bias, activation, gate, row scale, rounding.
//
//   plain: out[row, c] = round(scale[row] * act(sum[c] + bias[c]))
//   gated: out[row, c] = round(scale[row] * (act(sum[c] + bias[c]) * (sum[F + c] + bias[F + c])))     F: output width
//
// All of it in float32, rounded once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activations.cuh"
#include "dtype.cuh"
#include "moekernels/params.h"

namespace moekernels {

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
