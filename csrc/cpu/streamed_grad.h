// When a weight gradient is written past the caches, which would have to read its lines first.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace moekernels::cpu {
namespace {

// Gradients of as many bytes are out of the caches before anyone reads them.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;

// Whether that pays, and every row of the gradient begins with a line.
template <class T>
bool is_streamed(const GroupedWeightGradParams& p) {
  constexpr int64_t kLine = 64, kSize = sizeof(T);
  return p.num_experts * p.out_features * p.in_features * kSize >= kStreamedBytes &&
         p.in_features * kSize % kLine == 0 && reinterpret_cast<uintptr_t>(p.grad_weight) % kLine == 0;
}

}  // namespace
}  // namespace moekernels::cpu
