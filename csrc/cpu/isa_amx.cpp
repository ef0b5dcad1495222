// Compiled with -mamx-tile -mamx-bf16 on top of the flags of isa_avx512bf16.cpp.
#define MOEKERNELS_VECTOR_BYTES 64
#define MOEKERNELS_NATIVE_BFLOAT16 1
#define MOEKERNELS_FETCH_FROM_MEMORY 0  // such processors do it better themselves

#include "kernel_table.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_gemm_task.h"
#include "amx_weight_grad_task.h"
#include "kernels.h"

namespace moekernels::cpu {
namespace {

constexpr GemmSizes amx_sizes(int64_t right_bytes) {
  return {
      .packed_element_size = sizeof(BFloat16),
      .chunk = kAmxChunk,
      .row_granule = kAmxRows,
      .max_rows = kAmxMaxCols,
      .padding = 0,
      .packed_bytes = 1024 * 1024,
      .weight_rows = kAmxMaxCols,
      .min_weight_rows = kAmxMinCols,
      .right_bytes = right_bytes,
  };
}

constexpr KernelTable kKernels = kernel_table({
    .sizes = amx_sizes(0),
    .run = run_amx_gemm_task,
    .across = amx_sizes(kAmxMaxCols * kAmxChunk * sizeof(BFloat16)),
    .run_transposed = run_amx_transposed_gemm_task,
    .weight_grad = run_amx_weight_grad_task,
});

}  // namespace

const KernelTable* amx_kernels() {
  return &kKernels;
}

}  // namespace moekernels::cpu
#else
const moekernels::cpu::KernelTable* moekernels::cpu::amx_kernels() {
  return nullptr;
}
#endif
