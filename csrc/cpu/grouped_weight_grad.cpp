// grad_rows [N, M], rows [N, K], expert_offsets [E + 1] -> grad_weight [E, M, K], grad_bias [E, M]
//
// The work is cut into tasks of some rows of an expert's gradient times some of its columns; each sums over all rows of
// the expert. How an output is summed depends on the expert's rows alone, not on who computes it.
#include <atomic>

#include "common/rounding.h"
#include "cpu/gemm_blocking.h"

namespace moekernels {
namespace {

using cpu::GemmBlocking;
using cpu::WeightGradTask;

constexpr int64_t kDepth = 1024;                   // rows of an expert that are packed at a time
constexpr int64_t kMinCols = 128;                  // per task
constexpr int64_t kTasksPerWorker = 16;            // as many as let workers finish together
constexpr int64_t kProductsPerWorker = 64 * 1024;  // fewer are not worth waking another thread for

GemmBlocking blocking_of(const GroupedWeightGradParams& p, const cpu::GemmKernel& kernel) {
  return cpu::gemm_blocking(kernel.mn_major, p.out_features, clamp(p.num_rows, 0, kDepth), false);
}

class GroupedWeightGrad {
 public:
  GroupedWeightGrad(const GroupedWeightGradParams& params, const Parallel& parallel)
      : p_(params),
        kernel_(cpu::kernels().gemm[static_cast<int32_t>(params.dtype)]),
        blocking_(blocking_of(params, kernel_)),
        row_blocks_(ceil_div(params.out_features, blocking_.rows)),
        cols_(clamp(params.in_features, 1, params.in_features + 1)) {
    const int64_t products = (p_.num_rows + p_.num_experts) * p_.out_features * p_.in_features;
    num_workers_ = clamp(products / kProductsPerWorker, 1, parallel.num_threads);
    while (num_workers_ > 1 && cols_ > kMinCols && num_tasks() < num_workers_ * kTasksPerWorker) {
      cols_ = round_up(ceil_div(cols_, 2), kMinCols);
    }
  }

  void run(const Parallel& parallel) {
    if (num_tasks() == 0) return;
    auto* const memory = cpu::scratch<char>(parallel, num_workers_ * blocking_.scratch_bytes);
    cpu::for_workers(parallel, num_workers_, [this, memory](int64_t worker) {
      void* scratch = memory + worker * blocking_.scratch_bytes;
      for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks();) {
        kernel_.weight_grad(p_, blocking_, task_of(i), scratch);
      }
    });
  }

 private:
  int64_t col_blocks() const { return p_.in_features > 0 ? ceil_div(p_.in_features, cols_) : 1; }
  int64_t num_tasks() const { return p_.num_experts * row_blocks_ * col_blocks(); }

  // Offsets are clamped, so that wrong ones give wrong results but stay inside the tensors.
  WeightGradTask task_of(int64_t index) const {
    const int64_t row_block = index % row_blocks_;
    const int64_t col_block = index / row_blocks_ % col_blocks();
    WeightGradTask task;
    task.expert = index / row_blocks_ / col_blocks();
    task.begin = clamp(p_.expert_offsets[task.expert], 0, p_.num_rows);
    task.end = clamp(p_.expert_offsets[task.expert + 1], task.begin, p_.num_rows);
    task.row_begin = p_.out_features * row_block / row_blocks_;
    task.row_end = p_.out_features * (row_block + 1) / row_blocks_;
    task.col_begin = col_block * cols_;
    task.col_end = clamp(task.col_begin + cols_, 0, p_.in_features);
    return task;
  }

  const GroupedWeightGradParams& p_;
  const cpu::GemmKernel& kernel_;
  const GemmBlocking blocking_;
  const int64_t row_blocks_;
  int64_t cols_;  // per task
  int64_t num_workers_;
  std::atomic<int64_t> next_task_{0};
};

}  // namespace

void run(const GroupedWeightGradParams& params, const Parallel& parallel) {
  GroupedWeightGrad(params, parallel).run(parallel);
}

}  // namespace moekernels
