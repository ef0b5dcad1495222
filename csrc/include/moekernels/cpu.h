// The ops on the CPU. Torch-free: threads and scratch memory come from the caller through `Parallel`.
#pragma once

#include "moekernels/params.h"

#pragma GCC visibility push(default)

namespace moekernels {

// Threads and memory that the caller lends an op, as function pointers.
struct Parallel {
  using Body = void (*)(void* body_context, int64_t begin, int64_t end);
  // Calls body(body_context, begin, end) on disjoint ranges that cover [0, num_tasks), possibly at the same time, and
  // returns when all are done.
  void (*run)(void* pool, int64_t num_tasks, Body body, void* body_context);
  // `num_bytes` > 0, aligned to 64, which belong to the op until it returns. Asked for once at most, before `run`.
  void* (*scratch)(void* pool, int64_t num_bytes);
  void* pool;
  int32_t num_threads;
};

// Runs everything on the calling thread.
const Parallel& serial();

// The instruction sets that kernels were written for, best last.
enum class CpuIsa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

const char* name_of(CpuIsa isa);
CpuIsa best_cpu_isa();         // what this machine has, this build contains and MOEKERNELS_CPU_ISA allows
CpuIsa current_cpu_isa();      // best_cpu_isa(), or less after set_cpu_isa
void set_cpu_isa(CpuIsa isa);  // clamped to best_cpu_isa(); for tests and benchmarks

// Each reads and writes exactly what params.h says and cannot fail on valid parameters.
void run(const RouteParams& params, const Parallel& parallel);
void run(const RouteByScoreParams& params, const Parallel& parallel);
void run(const TransposeParams& params, const Parallel& parallel);
void run(const PlanParams& params, const Parallel& parallel);
void run(const PermuteParams& params, const Parallel& parallel);
void run(const GroupedGemmParams& params, const Parallel& parallel);
void run(const QuantizedGemmParams& params, const Parallel& parallel);
void run(const UnpermuteParams& params, const Parallel& parallel);
void run(const RmsNormParams& params, const Parallel& parallel);
void run(const AttentionParams& params, const Parallel& parallel);

void run(const GroupedWeightGradParams& params, const Parallel& parallel);
void run(const ActivationParams& params, const Parallel& parallel);
void run(const ActivationGradParams& params, const Parallel& parallel);
void run(const UnpermuteGradParams& params, const Parallel& parallel);
void run(const RouteGradParams& params, const Parallel& parallel);
void run(const RouterStatsParams& params, const Parallel& parallel);
void run(const RouterStatsGradParams& params, const Parallel& parallel);

}  // namespace moekernels

#pragma GCC visibility pop
