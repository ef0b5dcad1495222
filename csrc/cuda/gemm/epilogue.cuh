// From sums to outputs, the same for every grouped GEMM: bias, activation, gate, row scale, rounding.
//
//   plain: out[row, c] = round(scale[row] * act(sum[c] + bias[c]))
//   gated: out[row, c] = round(scale[row] * (act(sum[c] + bias[c]) * (sum[F + c] + bias[F + c])))     F: output width
//
// All of it in float32, rounded once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/activations.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/gemm/expert_weight.cuh"
#include "moekernels/params.h"

namespace moekernels {

// ---- operands ----

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
