// rows [N, K], weight [E, M, K] or transposed [E, K, M], expert_offsets [E + 1] -> out [N, M], or [N, M / 2] when gated
//
// The work is cut into tasks of some rows of an expert times some columns. Workers take tasks from a common counter, so
// uneven experts balance out; each output belongs to one task, so who took it does not matter. The tasks of one column
// block come one after the other: its weights are still in the cache for the next rows. Where there is one expert the
// tasks of one row block do, which find their rows packed.
#include <atomic>
#include <cstring>

#include "common/rounding.h"
#include "cpu/gemm_blocking.h"

namespace moekernels {
namespace {

using cpu::GemmBlocking;
using cpu::GemmTask;

constexpr int64_t kTasksPerWorker = 16;           // as many as let workers finish together
constexpr int64_t kEqualTasksPerWorker = 4;       // where all have the same rows
constexpr int64_t kWeightsPerWorker = 64 * 1024;  // fewer are not worth waking another thread for
constexpr int64_t kZeroedBytesPerTask = 256 * 1024;

int64_t output_width(const GroupedGemmParams& p) {
  return p.gated ? p.out_features / 2 : p.out_features;
}

// The parts of the weight that the output's columns are cut into. Gated, each goes with a part of values.
int64_t column_parts(const GroupedGemmParams& p) {
  if (p.weight_parts == nullptr || p.transposed) return 1;
  return p.gated && p.num_parts > 1 ? p.num_parts / 2 : p.num_parts;
}

const cpu::GemmSizes& sizes_of(const GroupedGemmParams& p, const cpu::GemmKernel& kernel) {
  return p.transposed ? kernel.mn_major : kernel.k_major;
}

GemmBlocking blocking_of(const GroupedGemmParams& p, const cpu::GemmKernel& kernel) {
  return cpu::gemm_blocking(sizes_of(p, kernel), p.num_rows, p.in_features, p.gated);
}

class GroupedGemm {
 public:
  GroupedGemm(const GroupedGemmParams& params, const Parallel& parallel)
      : p_(params),
        kernel_(cpu::kernels().gemm[static_cast<int32_t>(params.dtype)]),
        blocking_(blocking_of(params, kernel_)),
        out_width_(output_width(params)),
        parts_(column_parts(params)),
        part_width_(out_width_ / parts_) {
    cut(parallel);
  }

  void run(const Parallel& parallel) {
    if (num_tasks_ == 0) return;
    scratch_ = cpu::scratch<char>(parallel, num_workers_ * blocking_.scratch_bytes);
    cpu::for_workers(parallel, num_workers_, [this](int64_t worker) { work(worker); });
  }

 private:
  struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
  };

  // Clamped, so that wrong offsets give wrong results but stay inside the tensors.
  Range rows_of(int64_t expert) const {
    const int64_t begin = clamp(p_.expert_offsets[expert], 0, p_.num_rows);
    return {begin, clamp(p_.expert_offsets[expert + 1], begin, p_.num_rows)};
  }

  int64_t row_blocks(int64_t expert) const { return ceil_div(rows_of(expert).size(), blocking_.rows); }
  int64_t part_blocks() const { return ceil_div(part_width_, cols_); }
  int64_t col_blocks() const { return parts_ * part_blocks(); }
  int64_t tasks_of(int64_t expert) const { return row_blocks(expert) * col_blocks(); }

  // Wide tasks save packing; narrow ones give every worker something to do until the end.
  void cut(const Parallel& parallel) {
    int64_t blocks = 0;
    for (int64_t e = 0; e < p_.num_experts; ++e) blocks += row_blocks(e);
    const int64_t row_bytes = out_width_ * size_of(p_.dtype);
    first_unused_row_ = p_.num_experts > 0 ? rows_of(p_.num_experts - 1).end : 0;
    zero_rows_ = clamp(kZeroedBytesPerTask / (row_bytes > 0 ? row_bytes : 1), 1, kZeroedBytesPerTask);
    const int64_t zero_tasks = row_bytes > 0 ? ceil_div(p_.num_rows - first_unused_row_, zero_rows_) : 0;

    const int64_t weights = blocks * p_.out_features * p_.in_features;
    num_workers_ = clamp(weights / kWeightsPerWorker + zero_tasks, 1, parallel.num_threads);
    cols_ = clamp(part_width_, 1, part_width_ + 1);
    const int64_t min_cols = sizes_of(p_, kernel_).min_weight_rows / (p_.gated ? 2 : 1);
    const int64_t tasks = num_workers_ * (p_.num_experts == 1 ? kEqualTasksPerWorker : kTasksPerWorker);
    while (num_workers_ > 1 && cols_ > min_cols && blocks * col_blocks() < tasks) {
      cols_ = round_up(ceil_div(cols_, 2), min_cols);
    }
    num_gemm_tasks_ = blocks * col_blocks();
    num_tasks_ = num_gemm_tasks_ + zero_tasks;
  }

  void work(int64_t worker) {
    void* scratch = scratch_ + worker * blocking_.scratch_bytes;
    int64_t expert = 0, first_task = 0;  // of the expert
    int64_t packed_row = -1;             // where the rows of the last task begin
    for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
      if (i >= num_gemm_tasks_) {
        zero(i - num_gemm_tasks_);
        continue;
      }
      for (int64_t tasks; i >= first_task + (tasks = tasks_of(expert)); ++expert) first_task += tasks;
      const auto run = p_.transposed ? kernel_.run_transposed : kernel_.run;
      GemmTask task = task_of(expert, i - first_task);
      task.rows_packed = task.row_begin == packed_row;
      packed_row = task.row_begin;
      run(p_, blocking_, task, scratch);
    }
  }

  // Row blocks of an expert are equal but for rounding: none is left with a few rows.
  GemmTask task_of(int64_t expert, int64_t index) const {
    const Range rows = rows_of(expert);
    const int64_t blocks = row_blocks(expert);
    const int64_t row_block = p_.num_experts == 1 ? index / col_blocks() : index % blocks;
    const int64_t col_block = p_.num_experts == 1 ? index % col_blocks() : index / blocks;
    GemmTask task{};
    task.expert = expert;
    task.row_begin = rows.begin + rows.size() * row_block / blocks;
    task.row_end = rows.begin + rows.size() * (row_block + 1) / blocks;
    const int64_t part_begin = col_block / part_blocks() * part_width_;
    task.col_begin = part_begin + col_block % part_blocks() * cols_;
    task.col_end = clamp(task.col_begin + cols_, 0, part_begin + part_width_);
    return task;
  }

  void zero(int64_t index) const {
    const int64_t begin = first_unused_row_ + index * zero_rows_;
    const int64_t end = clamp(begin + zero_rows_, 0, p_.num_rows);
    const int64_t row_bytes = out_width_ * size_of(p_.dtype);
    std::memset(static_cast<char*>(p_.out) + begin * row_bytes, 0, static_cast<size_t>((end - begin) * row_bytes));
  }

  const GroupedGemmParams& p_;
  const cpu::GemmKernel& kernel_;
  const GemmBlocking blocking_;
  const int64_t out_width_;
  const int64_t parts_;  // that a task's columns do not cross
  const int64_t part_width_;
  int64_t cols_;  // per task
  int64_t num_workers_, num_gemm_tasks_, num_tasks_;
  int64_t first_unused_row_, zero_rows_;
  char* scratch_ = nullptr;
  std::atomic<int64_t> next_task_{0};
};

}  // namespace

void run(const GroupedGemmParams& params, const Parallel& parallel) {
  GroupedGemm(params, parallel).run(parallel);
}

}  // namespace moekernels
