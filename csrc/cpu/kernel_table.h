// What one instruction set provides. Every isa/*.cpp fills one table; the drivers call through it and are themselves
// compiled for the baseline machine.
#pragma once

#include <cstdint>

#include "moekernels/cpu.h"

namespace moekernels::cpu {

// A piece of a grouped GEMM: some rows of one expert times some of its columns. Columns are output columns; a gated
// task computes both the gate and the value of each.
struct GemmTask {
  int64_t expert;
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  bool rows_packed;  // the worker's last task had the same rows: where all of K fits, they are in its scratch still
};

// A piece of one expert's weight gradient: some of its rows (out features) times some of its columns (in features).
struct WeightGradTask {
  int64_t expert;
  int64_t begin, end;  // the rows of the expert, over which the sum runs
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
};

// Sizes of the pieces, and of the scratch that each worker needs for one: the packed rows, then what is packed of the
// right operand, then float32 sums.
struct GemmBlocking {
  int64_t rows;   // at most this many rows per task
  int64_t cols;   // output columns whose sums are kept at a time
  int64_t depth;  // elements of K that are packed at a time
  int64_t right_offset;
  int64_t sums_offset;
  int64_t scratch_bytes;
};

struct GemmSizes {
  int64_t packed_element_size;  // bytes of one element of packed rows
  int64_t chunk;                // elements of K that are summed in registers; depth is a multiple of it
  int64_t row_granule;          // scratch holds a multiple of so many rows
  int64_t min_rows;             // of a task where K is long: no fewer than make good use of each weight
  int64_t max_rows;             // of a task: as many as amortise what is done once for each block of weights
  int64_t padding;              // elements between packed rows, or between their elements where those are MN-major
  int64_t packed_bytes;         // of those rows: they stay in the second-level cache
  int64_t weight_rows;          // per block of columns; gate and value count separately
  int64_t min_weight_rows;      // of a task
  int64_t right_bytes;          // of the right operand that are packed at a time
};

struct GemmKernel {
  GemmSizes k_major;  // of K-major weights
  void (*run)(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task, void* scratch);
  GemmSizes mn_major;  // of MN-major operands: transposed weights, and both operands of a weight gradient
  void (*run_transposed)(const GroupedGemmParams& params, const GemmBlocking& blocking, const GemmTask& task,
                         void* scratch);
  void (*weight_grad)(const GroupedWeightGradParams& params, const GemmBlocking& blocking, const WeightGradTask& task,
                      void* scratch);
};

// A piece of attention: some of the rows of queries that look at the keys of one head of one row of the batch.
struct AttentionTask {
  int64_t key_batch, key_head;
  int64_t row_begin, row_end;
};

struct AttentionKernel {
  int64_t max_rows;  // of a task
  int64_t max_head_dim;
  int64_t (*scratch_bytes)(const AttentionParams& params);  // that each worker needs
  void (*run)(const AttentionParams& params, const AttentionTask& task, void* scratch);
};

// Products with a quantised weight whose codes are read as they are.
struct CodesKernel {
  int64_t streamed_rows[3];  // by DType: with more rows of an expert its weights are better unpacked
  int64_t max_rows;          // of a task
  int64_t (*scratch_bytes)(const QuantizedGemmParams& params, int64_t columns);
  void (*run)(const QuantizedGemmParams& params, const GemmTask& task, void* scratch);
};

// All of them: few rows with codes that are widened in registers, or, rounded to 8 bits, with the codes themselves;
// many with rows of the weight that are unpacked to the dtype of the GEMM and multiplied by its kernel.
struct QuantizedKernel {
  CodesKernel widening, integer;
  // To [rows][K], so many elements apart; scratch has room for the scales of a row.
  void (*unpack)(const QuantizedGemmParams& params, int64_t expert, int64_t row_begin, int64_t row_end, void* out,
                 int64_t stride, float* scratch);
  void (*round_row)(DType dtype, const void* row, void* target, int64_t n);  // to what it is as 8-bit integers
};

struct KernelTable {
  GemmKernel gemm[3];            // by DType
  AttentionKernel attention[3];  // by DType
  QuantizedKernel quantized;
  AttentionKernel attention_by_tiles;  // of many queries in bfloat16; of none without tile registers
  void (*unpermute)(const UnpermuteParams& params, int64_t token_begin, int64_t token_end);
  void (*unpermute_grad_rows)(const UnpermuteGradParams& params, int64_t row_begin, int64_t row_end);
  void (*unpermute_grad_weights)(const UnpermuteGradParams& params, int64_t token_begin, int64_t token_end);
  void (*rms_norm)(const RmsNormParams& params, int64_t row_begin, int64_t row_end);
  void (*activation)(const ActivationParams& params, int64_t row_begin, int64_t row_end);
  void (*activation_grad)(const ActivationGradParams& params, int64_t row_begin, int64_t row_end);

  // Router rows: n values of `dtype` to float32 and back; probs = softmax(logits); values rounded to `dtype`.
  void (*widen)(DType dtype, const void* source, float* target, int64_t n);
  void (*narrow)(DType dtype, const float* source, void* target, int64_t n);
  void (*softmax)(const float* logits, float* probs, int64_t n);
  void (*round)(DType dtype, float* values, int64_t n);

  // Choosing, see isa/choice_kernels.h.
  void (*score)(Score score, const float* logits, const float* bias, float* scores, float* choice, int64_t n);
  bool (*group_sums)(const float* choice, int64_t num_groups, int64_t size, float* sums);
  bool (*largest)(const float* scores, int64_t n, int32_t k, int32_t* indices);
};

// Null where the build or its target lacks the instruction set.
const KernelTable* portable_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512bf16_kernels();
const KernelTable* amx_kernels();

// The table of current_cpu_isa().
const KernelTable& kernels();

}  // namespace moekernels::cpu
