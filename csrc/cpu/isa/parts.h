// How sizes are cut and rounded. Like simd.h, included only by what is compiled once per instruction set.
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

MOEKERNELS_INLINE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
MOEKERNELS_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
MOEKERNELS_INLINE int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// n things in parts of at most `most`, which differ by one at most.
struct Parts {
  int64_t n, count;

  Parts(int64_t n, int64_t most) : n(n), count(ceil_div(n, most)) {}
  int64_t begin(int64_t part) const { return n * part / count; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

}  // namespace
}  // namespace moekernels::cpu
