// query [B, H, Q, D], key and value [B', G, S, D] -> out [B, Q, H, D]
//
// A task is some of the rows that look at the keys of one head of one row of the batch. Workers take tasks from a
// common counter.
#include <atomic>

#include "kernel_table.h"
#include "parallel.h"

namespace moekernels {
namespace {

using cpu::AttentionScratch;
using cpu::AttentionTask;
using cpu::ceil_div;
using cpu::round_up;

constexpr int64_t kElementsPerWorker = 32 * 1024;  // of keys and values; fewer are not worth waking another thread for
constexpr int64_t kLine = 64;

AttentionScratch scratch_of(const AttentionParams& p, int64_t max_rows) {
  constexpr int64_t kMostStep = 32;   // elements of a row are packed in steps of at most so many
  constexpr int64_t kMostLanes = 16;  // and scores are written by vectors of at most so many
  AttentionScratch s;
  s.score_stride = round_up(p.num_keys > 0 ? p.num_keys : 1, kMostLanes);
  s.scores_offset = max_rows * round_up(p.head_dim, kMostStep) * static_cast<int64_t>(sizeof(float));
  s.bytes = round_up(s.scores_offset + max_rows * s.score_stride * static_cast<int64_t>(sizeof(float)), kLine);
  return s;
}

// Rows of queries that look at the same keys.
int64_t rows_per_key(const AttentionParams& p) {
  return p.batch_size / p.key_batch_size * (p.num_heads / p.num_key_heads) * p.num_queries;
}

int64_t workers(const AttentionParams& p, const Parallel& parallel) {
  const int64_t elements = p.key_batch_size * p.num_key_heads * p.num_keys * p.head_dim * 2 * rows_per_key(p);
  const int64_t most = elements / kElementsPerWorker;
  return most < 1 ? 1 : most < parallel.num_threads ? most : parallel.num_threads;
}

}  // namespace

int64_t attention_workspace_cpu(const AttentionParams& p, const Parallel& parallel) {
  return scratch_of(p, cpu::kernels().attention_rows).bytes * workers(p, parallel);
}

void attention_cpu(const AttentionParams& p, const Parallel& parallel) {
  const cpu::KernelTable& kernels = cpu::kernels();
  const auto run = kernels.attention[static_cast<int32_t>(p.dtype)];
  const AttentionScratch scratch = scratch_of(p, kernels.attention_rows);
  const int64_t rows = rows_per_key(p);
  const int64_t blocks = ceil_div(rows, kernels.attention_rows);
  const int64_t num_tasks = p.key_batch_size * p.num_key_heads * blocks;
  std::atomic<int64_t> next_task{0};
  cpu::for_workers(parallel, workers(p, parallel), [&](int64_t worker) {
    void* memory = static_cast<char*>(p.workspace) + worker * scratch.bytes;
    for (int64_t i; (i = next_task.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      const int64_t block = i % blocks, head = i / blocks;
      const AttentionTask task{head / p.num_key_heads, head % p.num_key_heads, rows * block / blocks,
                               rows * (block + 1) / blocks};
      run(p, task, scratch, memory);
    }
  });
}

}  // namespace moekernels
