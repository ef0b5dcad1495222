// query [B, H, Q, D], key and value [B', G, S, D] -> out [B, Q, H, D]
//
// A task is some of the rows that look at the keys of one head of one row of the batch. Workers take a few at a time
// from a common counter. A few queries read the keys from where they lie; for many of them tile registers are the
// faster.
#include <atomic>

#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

using cpu::AttentionKernel;
using cpu::AttentionTask;

constexpr int64_t kElementsPerWorker = 32 * 1024;  // of keys and values; fewer are not worth waking another thread for
constexpr int64_t kChunksPerWorker = 8;
constexpr int64_t kLine = 64;

// From here on packing the keys pays. What counts are the queries of one row and head, whose bits thus do not depend on
// what else is computed.
constexpr int64_t kMinQueriesByTiles = 9;

const AttentionKernel& kernel_for(const AttentionParams& p) {
  const cpu::KernelTable& kernels = cpu::kernels();
  const bool by_tiles = p.dtype == DType::kBFloat16 && p.num_queries >= kMinQueriesByTiles &&
                        p.head_dim <= kernels.attention_by_tiles.max_head_dim;
  return by_tiles ? kernels.attention_by_tiles : kernels.attention[static_cast<int32_t>(p.dtype)];
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

void run(const AttentionParams& p, const Parallel& parallel) {
  const AttentionKernel& kernel = kernel_for(p);
  const int64_t bytes = round_up(kernel.scratch_bytes(p), kLine);  // aligned for each worker
  const int64_t rows = rows_per_key(p);
  const int64_t blocks = ceil_div(rows, kernel.max_rows);
  const int64_t num_tasks = p.key_batch_size * p.num_key_heads * blocks;
  const int64_t num_workers = workers(p, parallel);
  // The heads of a row lie side by side, and a processor fetches what lies beside what it reads.
  const int64_t chunk = ceil_div(num_tasks, kChunksPerWorker * num_workers);
  auto* const scratch = cpu::scratch<char>(parallel, num_workers * bytes);
  std::atomic<int64_t> next_task{0};
  cpu::for_workers(parallel, num_workers, [&](int64_t worker) {
    void* memory = scratch + worker * bytes;
    for (int64_t begin; (begin = next_task.fetch_add(chunk, std::memory_order_relaxed)) < num_tasks;) {
      for (int64_t i = begin; i < begin + chunk && i < num_tasks; ++i) {
        const int64_t block = i % blocks, head = i / blocks;
        const AttentionTask task{head / p.num_key_heads, head % p.num_key_heads, rows * block / blocks,
                                 rows * (block + 1) / blocks};
        kernel.run(p, task, memory);
      }
    }
  });
}

}  // namespace moekernels
