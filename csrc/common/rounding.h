// How sizes are cut and rounded, on the host and on a GPU. Not for cpu/isa, which has its own (cpu/isa/parts.h).
#pragma once

#include <cstdint>

namespace moekernels {

// Of integers that are not negative; the type is that of a + b.
template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

template <class A, class B>
constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

constexpr int64_t clamp(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

}  // namespace moekernels
