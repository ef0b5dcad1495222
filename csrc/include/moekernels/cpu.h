// The ops on the CPU. Torch-free: threads come from the caller through `Parallel`.
#pragma once

#include "moekernels/params.h"

#pragma GCC visibility push(default)

namespace moekernels {

// A thread pool, as a function pointer. `run` calls body(body_context, begin, end) on disjoint ranges that cover
// [0, num_tasks), possibly at the same time, and returns when all are done.
struct Parallel {
  using Body = void (*)(void* body_context, int64_t begin, int64_t end);
  void (*run)(void* pool, int64_t num_tasks, Body body, void* body_context);
  void* pool;
  int32_t num_threads;
};

// Runs everything on the calling thread.
const Parallel& serial();

// The instruction sets that kernels were written for, best last.
enum class CpuIsa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

const char* name_of(CpuIsa isa);
CpuIsa best_cpu_isa();         // what this machine has (and this build contains)
CpuIsa current_cpu_isa();      // best_cpu_isa(), or less: MOEKERNELS_CPU_ISA in the environment, or set_cpu_isa
void set_cpu_isa(CpuIsa isa);  // clamped to best_cpu_isa(); for tests and benchmarks

// Each reads and writes exactly what params.h says and cannot fail on valid parameters.
// Workspace: bytes of scratch, 64-byte aligned, that the caller provides in `params.workspace` (0: none needed).
int64_t plan_workspace_cpu(const PlanParams& params, const Parallel& parallel);
int64_t grouped_gemm_workspace_cpu(const GroupedGemmParams& params, const Parallel& parallel);
int64_t grouped_weight_grad_workspace_cpu(const GroupedWeightGradParams& params, const Parallel& parallel);
int64_t attention_workspace_cpu(const AttentionParams& params, const Parallel& parallel);
int64_t router_stats_workspace_cpu(const RouterStatsParams& params, const Parallel& parallel);

void route_cpu(const RouteParams& params, const Parallel& parallel);
void plan_cpu(const PlanParams& params, const Parallel& parallel);
void permute_cpu(const PermuteParams& params, const Parallel& parallel);
void grouped_gemm_cpu(const GroupedGemmParams& params, const Parallel& parallel);
void unpermute_cpu(const UnpermuteParams& params, const Parallel& parallel);
void rms_norm_cpu(const RmsNormParams& params, const Parallel& parallel);
void attention_cpu(const AttentionParams& params, const Parallel& parallel);

void grouped_weight_grad_cpu(const GroupedWeightGradParams& params, const Parallel& parallel);
void activation_cpu(const ActivationParams& params, const Parallel& parallel);
void activation_grad_cpu(const ActivationGradParams& params, const Parallel& parallel);
void unpermute_grad_cpu(const UnpermuteGradParams& params, const Parallel& parallel);
void route_grad_cpu(const RouteGradParams& params, const Parallel& parallel);
void router_stats_cpu(const RouterStatsParams& params, const Parallel& parallel);
void router_stats_grad_cpu(const RouterStatsGradParams& params, const Parallel& parallel);

}  // namespace moekernels

#pragma GCC visibility pop
