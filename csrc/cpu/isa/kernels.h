// The table of the instruction set that the including isa/*.cpp is compiled for, but for its bfloat16.
#pragma once

#include "cpu/isa/activation_kernels.h"
#include "cpu/isa/attention_task.h"
#include "cpu/isa/choice_kernels.h"
#include "cpu/isa/gemm_task.h"
#include "cpu/isa/quantized_integer_kernel.h"
#include "cpu/isa/quantized_kernel.h"
#include "cpu/isa/quantized_unpack.h"
#include "cpu/isa/rms_norm_kernel.h"
#include "cpu/isa/row_kernels.h"
#include "cpu/isa/transposed_gemm_task.h"
#include "cpu/isa/weight_grad_task.h"

namespace moekernels::cpu {
namespace {

template <class Dot>
constexpr GemmKernel gemm_kernel() {
  using Outer = typename OuterOf<typename Dot::Weight>::Type;
  return {
      .k_major =
          {
              .packed_element_size = sizeof(typename Dot::Packed),
              .chunk = Dot::kChunk,
              .row_granule = 1,
              .min_rows = 48,
              .max_rows = 128,
              .padding = 0,
              .packed_bytes = 512 * 1024,
              .weight_rows = kBlockWeightRows,
              .min_weight_rows = 32,
              .right_bytes = 0,
          },
      .run = run_gemm_task<Dot>,
      .mn_major =
          {
              .packed_element_size = sizeof(typename Outer::Word) / Outer::kElements,
              .chunk = kOuterChunk * Outer::kElements,
              .row_granule = kLanes,
              .min_rows = 48,
              .max_rows = 256,
              .padding = kOuterPadding * Outer::kElements,
              .packed_bytes = 1024 * 1024,
              .weight_rows = 8 * kOuterCols,
              .min_weight_rows = 32,
              .right_bytes = kOuterChunk * kOuterCols * int64_t(sizeof(typename Outer::Word)),
          },
      .run_transposed = run_transposed_gemm_task<typename Dot::Weight>,
      .weight_grad = run_weight_grad_task<typename Dot::Weight>,
  };
}

#if MOEKERNELS_NATIVE_BFLOAT16
using DotOfBFloat16 = DotBFloat16Native;
#else
using DotOfBFloat16 = DotBFloat16;
#endif

constexpr int64_t kAnyRows = INT64_MAX;

constexpr QuantizedKernel quantized_kernel(
    CodesKernel integer = {{kAnyRows, kAnyRows, kAnyRows}, kIntegerRows, integer_scratch_bytes, integer_gemm},
    int64_t widened_bfloat16_rows = kQuantizedRows) {
  return {
      .widening = {{kQuantizedRows, widened_bfloat16_rows, kQuantizedRows},
                   kQuantizedRows,
                   quantized_scratch_bytes,
                   quantized_gemm},
      .integer = integer,
      .unpack = unpack_rows,
      .round_row = round_row,
  };
}

constexpr KernelTable kernel_table(GemmKernel float32_gemm, GemmKernel bfloat16_gemm,
                                   QuantizedKernel quantized = quantized_kernel(),
                                   AttentionKernel attention_by_tiles = {}) {
  return {
      {float32_gemm, bfloat16_gemm, gemm_kernel<DotFloat16>()},
      {attention_kernel<DotFloat32>(), attention_kernel<DotOfBFloat16>(), attention_kernel<DotFloat16>()},
      quantized,
      attention_by_tiles,
      unpermute,
      unpermute_grad_rows,
      unpermute_grad_weights,
      rms_norm,
      activation,
      activation_grad,
      widen,
      narrow,
      softmax,
      round,
      score,
      group_sums,
      largest,
  };
}

}  // namespace
}  // namespace moekernels::cpu
