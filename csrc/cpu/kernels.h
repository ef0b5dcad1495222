// The table of the instruction set that the including isa_*.cpp is compiled for, but for its bfloat16.
#pragma once

#include "activation_kernels.h"
#include "gemm_task.h"
#include "row_kernels.h"
#include "weight_grad_task.h"

namespace moekernels::cpu {
namespace {

template <class Dot>
constexpr GemmKernel gemm_kernel() {
  return {
      .packed_element_size = sizeof(typename Dot::Packed),
      .chunk = Dot::kChunk,
      .row_granule = 1,
      .max_rows = 128,
      .packed_bytes = 512 * 1024,
      .weight_rows = 128,
      .run = run_gemm_task<Dot>,
      .weight_grad = run_weight_grad_task<Dot>,
  };
}

constexpr KernelTable kernel_table(GemmKernel bfloat16_gemm) {
  return {
      {gemm_kernel<DotFloat32>(), bfloat16_gemm, gemm_kernel<DotFloat16>()},
      unpermute,
      unpermute_grad_rows,
      unpermute_grad_weights,
      activation,
      activation_grad,
      widen,
      narrow,
      softmax,
      round,
  };
}

}  // namespace
}  // namespace moekernels::cpu
