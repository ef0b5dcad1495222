// The table of the instruction set that the including isa_*.cpp is compiled for.
#pragma once

#include "activation_kernels.h"
#include "gemm_task.h"
#include "row_kernels.h"
#include "weight_grad_task.h"

namespace moekernels::cpu {
namespace {

#if MOEKERNELS_NATIVE_BFLOAT16
using BestDotBFloat16 = DotBFloat16Native;
#else
using BestDotBFloat16 = DotBFloat16;
#endif

template <class Dot>
constexpr GemmKernel gemm_kernel() {
  return {sizeof(typename Dot::Packed), Dot::kChunk, run_gemm_task<Dot>, run_weight_grad_task<Dot>};
}

constexpr KernelTable kKernels = {
    {gemm_kernel<DotFloat32>(), gemm_kernel<BestDotBFloat16>(), gemm_kernel<DotFloat16>()},
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

}  // namespace
}  // namespace moekernels::cpu
