// When an output is written by non-temporal stores, past the caches, which would have to read its lines first. Who does
// so lets the stores finish (_mm_sfence) before another thread is told that the task is done.
#pragma once

#include "cpu/isa/simd.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// Outputs of as many bytes are out of the second-level cache before anyone reads them.
constexpr int64_t kNonTemporalBytes = 8 * 1024 * 1024;

// Whether that pays, and every row of the output begins with a line.
inline bool is_non_temporal(const void* output, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLine = 64;
  return rows * row_bytes >= kNonTemporalBytes && row_bytes % kLine == 0 &&
         reinterpret_cast<uintptr_t>(output) % kLine == 0;
}

template <class T>
bool is_non_temporal(const GroupedWeightGradParams& p) {
  return is_non_temporal(p.grad_weight, p.num_experts * p.out_features, p.in_features * int64_t(sizeof(T)));
}

}  // namespace
}  // namespace moekernels::cpu
