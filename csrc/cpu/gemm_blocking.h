// How large the pieces of a grouped GEMM or of a weight gradient are, so that what a worker uses often stays in its
// second-level cache.
#pragma once

#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace moekernels::cpu {

constexpr int64_t kLine = 64;  // of caches, in bytes

// For `rows` rows at most and sums over `depth` elements.
inline GemmBlocking gemm_blocking(const GemmSizes& sizes, int64_t rows, int64_t depth, bool gated) {
  const int64_t elements = sizes.packed_bytes / sizes.packed_element_size;
  const int64_t all_depth = round_up(depth > 0 ? depth : 1, sizes.chunk);
  GemmBlocking b{};
  b.rows = clamp(elements / all_depth, sizes.min_rows, sizes.max_rows);
  b.rows = clamp(rows, 1, b.rows);
  b.depth = clamp(elements / b.rows / sizes.chunk * sizes.chunk, sizes.chunk, all_depth);
  b.cols = sizes.weight_rows / (gated ? 2 : 1);
  const int64_t room = round_up(b.rows, sizes.row_granule);
  const int64_t padding = sizes.padding * (room > b.depth ? room : b.depth);
  b.right_offset = round_up((room * b.depth + padding) * sizes.packed_element_size, kLine);
  b.sums_offset = round_up(b.right_offset + sizes.right_bytes, kLine);
  b.scratch_bytes = round_up(b.sums_offset + room * sizes.weight_rows * static_cast<int64_t>(sizeof(float)), kLine);
  return b;
}

}  // namespace moekernels::cpu
