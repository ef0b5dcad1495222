// How large the pieces of a grouped GEMM or of a weight gradient are, so that what a worker uses often stays in its
// second-level cache.
#pragma once

#include "kernel_table.h"
#include "parallel.h"

namespace moekernels::cpu {

inline int64_t clamp(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

// For `rows` rows at most and sums over `depth` elements. `transposed_element_size`: bytes of an element of weights
// that are transposed into scratch; 0: they are not.
inline GemmBlocking gemm_blocking(const GemmKernel& kernel, int64_t rows, int64_t depth, bool gated,
                                  int64_t transposed_element_size) {
  constexpr int64_t kMinRows = 48;  // per task, where K is long: no fewer than make good use of each weight
  constexpr int64_t kLine = 64;

  const int64_t elements = kernel.packed_bytes / kernel.packed_element_size;
  const int64_t all_depth = round_up(depth > 0 ? depth : 1, kernel.chunk);
  GemmBlocking b{};
  b.rows = clamp(elements / all_depth, kMinRows, kernel.max_rows);
  b.rows = clamp(rows, 1, b.rows);
  b.depth = clamp(elements / b.rows / kernel.chunk * kernel.chunk, kernel.chunk, all_depth);
  b.cols = kernel.weight_rows / (gated ? 2 : 1);
  const int64_t room = round_up(b.rows, kernel.row_granule);
  b.weights_offset = round_up(room * b.depth * kernel.packed_element_size, kLine);
  b.sums_offset = b.weights_offset;
  if (transposed_element_size > 0) {
    // One line more than a power of two, lest all columns compete for the same few places of the first-level cache.
    b.weights_stride = clamp(kernel.chunk, 0, all_depth) + kLine / transposed_element_size;
    b.sums_offset += kernel.weight_rows * b.weights_stride * transposed_element_size;
  }
  b.scratch_bytes = round_up(b.sums_offset + room * kernel.weight_rows * static_cast<int64_t>(sizeof(float)), kLine);
  return b;
}

}  // namespace moekernels::cpu
