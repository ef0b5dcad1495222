// CUDA's own names for kernels that g++ compiles: included ahead of every kernel source (g++ -include).
//
// Only what has one exact meaning on every GPU is here. Floating-point atomics are left out on purpose: kernels must
// give the same bits every time.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulated.h"

// All static shared memory of a library is one range, which the runtime can poison before each block.
#undef __shared__
#define __shared__ static thread_local

#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_shape())
#define gridDim (::simt::grid_shape())
constexpr int warpSize = 32;

// ---- barriers, fences ----

inline void __syncthreads() {
  ::simt::syncthreads(false, 0);
}
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(::simt::syncthreads(predicate != 0, 0));
}
inline int __syncthreads_and(int predicate) {
  return static_cast<int>(::simt::syncthreads(predicate != 0, 1));
}
inline int __syncthreads_or(int predicate) {
  return static_cast<int>(::simt::syncthreads(predicate != 0, 2));
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  ::simt::syncwarp(mask);
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {
  ::simt::spin();
}
[[noreturn]] inline void __trap() {
  ::simt::trap("the kernel gave up");
}

// ---- shuffles, votes, reductions ----

namespace simt {
template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, operand, width);
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return ::simt::shuffle_value(::simt::Shuffle::kIndex, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::simt::shuffle_value(::simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::simt::shuffle_value(::simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return ::simt::shuffle_value(::simt::Shuffle::kXor, mask, value, lane_mask, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::simt::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return ::simt::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return ::simt::ballot(mask, predicate == 0) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return ::simt::match_any(mask, bits);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kAdd, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(::simt::reduce(::simt::Reduce::kAdd, mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kMin, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return static_cast<int>(::simt::reduce(::simt::Reduce::kSignedMin, mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kMax, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(::simt::reduce(::simt::Reduce::kSignedMax, mask, static_cast<unsigned>(value)));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kAnd, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kOr, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return ::simt::reduce(::simt::Reduce::kXor, mask, value);
}

// ---- atomics on integers ----

namespace simt {
template <class T, class Update>
T atomic_update(T* pointer, Update&& update) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  before_atomic(pointer, sizeof(T));
  // Only one fiber runs at a time, so these two are one. They bypass the compiler's hooks for plain accesses.
  T old;
  copy_bytes(&old, pointer, sizeof old);
  const T fresh = update(old);
  copy_bytes(pointer, &fresh, sizeof fresh);
  return old;
}
}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                  \
  template <class T>                                                                   \
  T name(T* pointer, std::common_type_t<T> value) {                                    \
    return ::simt::atomic_update(pointer, [value](T old) -> T { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicExch, (static_cast<void>(old), value))
SIMT_ATOMIC(atomicMin, std::min(old, value))
SIMT_ATOMIC(atomicMax, std::max(old, value))
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMIC

template <class T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return ::simt::atomic_update(pointer, [=](T old) { return old == expected ? value : old; });
}

// ---- loads and stores with a cache hint ----

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldca(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcg(T* pointer, std::common_type_t<T> value) {
  *pointer = value;
}
template <class T>
void __stcs(T* pointer, std::common_type_t<T> value) {
  *pointer = value;
}

// ---- arithmetic ----

using std::max;
using std::min;

namespace simt {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt

inline float __uint_as_float(unsigned x) {
  return ::simt::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return ::simt::bit_cast<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return ::simt::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
  return ::simt::bit_cast<int>(x);
}

inline float rsqrtf(float x) {
  return 1.f / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1.f / x;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
