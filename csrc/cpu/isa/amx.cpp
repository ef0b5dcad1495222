// Compiled with -mamx-tile -mamx-bf16 -mamx-int8 on top of the flags of avx512bf16.cpp.
#define MOEKERNELS_VECTOR_BYTES 64
#define MOEKERNELS_NATIVE_BFLOAT16 1
#define MOEKERNELS_FETCH_FROM_MEMORY 0  // but codes (fetch_ahead.h): such processors do it better themselves
#define MOEKERNELS_TILE_REGISTERS 1

#include "cpu/kernel_table.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)
#include "cpu/isa/amx/attention_task.h"
#include "cpu/isa/amx/gemm_task.h"
#include "cpu/isa/amx/integer_task.h"
#include "cpu/isa/amx/split_task.h"
#include "cpu/isa/amx/weight_grad_task.h"
#include "cpu/isa/kernels.h"

namespace moekernels::cpu {
namespace {

constexpr int64_t kMegabyte = 1024 * 1024;
constexpr int64_t kAmxStreamedRows = 4;  // of an expert; tiles multiply more sooner than vectors do, with unpacking
constexpr int64_t kElementSize = sizeof(BFloat16), kSplitSize = kSplitParts * kElementSize;

constexpr GemmSizes bfloat16_sizes(int64_t right_bytes) {
  return {
      .packed_element_size = kElementSize,
      .chunk = kAmxChunk,
      .row_granule = kAmxRows,
      .min_rows = 48,
      .max_rows = kAmxMaxCols,
      .padding = 0,
      .packed_bytes = kMegabyte,
      .weight_rows = kAmxMaxCols,
      .min_weight_rows = kAmxMinCols,
      .right_bytes = right_bytes,
  };
}

// Chunks and scratch memory serve the vector kernels too, which take some of the tasks.
constexpr GemmSizes float32_sizes(int64_t min_rows, int64_t max_rows, int64_t packed_bytes, int64_t right_elements) {
  return {
      .packed_element_size = kSplitSize,
      .chunk = DotFloat32::kChunk,
      .row_granule = kAmxRows,
      .min_rows = min_rows,
      .max_rows = max_rows,
      .padding = kOuterPadding,
      .packed_bytes = packed_bytes,
      .weight_rows = kAmxMaxCols,
      .min_weight_rows = kAmxMinCols,
      .right_bytes = right_elements * kSplitSize,
  };
}
static_assert(DotFloat32::kChunk % kSplitChunk == 0 && DotFloat32::kChunk % kOuterChunk == 0);

constexpr KernelTable kKernels = kernel_table(
    {
        .k_major = float32_sizes(kStreamRows, kStreamRows, 3 * kMegabyte / 4, kStreamElements),
        .run = run_float32_gemm_task,
        .mn_major = float32_sizes(128, kAmxMaxCols, 3 * kMegabyte / 2, 2 * kAmxMaxCols * kSplitChunk),
        .run_transposed = run_float32_transposed_gemm_task,
        .weight_grad = run_float32_weight_grad_task,
    },
    {
        .k_major = bfloat16_sizes(0),
        .run = run_amx_gemm_task,
        .mn_major = bfloat16_sizes(kAmxMaxCols * kAmxChunk * kElementSize),
        .run_transposed = run_amx_transposed_gemm_task,
        .weight_grad = run_amx_weight_grad_task,
    },
    quantized_kernel(
        {{kAnyRows, kAmxStreamedRows, kAnyRows}, kIntegerRows, amx_integer_scratch_bytes, amx_integer_gemm},
        kAmxStreamedRows),
    {
        .max_rows = kAmxAttentionRows,
        .max_head_dim = kAmxMaxCols,
        .scratch_bytes = amx_attention_scratch,
        .run = run_amx_attention_task,
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
