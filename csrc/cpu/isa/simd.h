// Vectors of one width and the few operations that differ between instruction sets.
//
// Included only by isa/*.cpp, which say how wide a vector is. Arithmetic, comparison and ?: come from the compiler's
// vector types. Everything is in an anonymous namespace, and nothing here or in the headers above it may use an inline
// function from elsewhere (std:: included): the linker keeps one copy of such a function, which might then be the one
// compiled for a machine that is not there.
#pragma once

#include <stdint.h>

#if MOEKERNELS_VECTOR_BYTES > 16
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define MOEKERNELS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define MOEKERNELS_UNROLL _Pragma("unroll")
#else
#define MOEKERNELS_UNROLL _Pragma("GCC unroll 32")
#endif

namespace moekernels::cpu {
namespace {

constexpr int kLanes = MOEKERNELS_VECTOR_BYTES / 4;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

// The same in memory: any alignment that an element has.
typedef float VecFMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecUMemory __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint16_t VecHMemory __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MOEKERNELS_INLINE VecF set1(float x) {
  return x - VecF{};  // compiles to a broadcast alone: unlike x + 0, it is x for -0 too
}
MOEKERNELS_INLINE VecF load(const float* p) {
  return *reinterpret_cast<const VecFMemory*>(p);
}
MOEKERNELS_INLINE void store(float* p, VecF v) {
  *reinterpret_cast<VecFMemory*>(p) = v;
}

#if MOEKERNELS_VECTOR_BYTES == 64

MOEKERNELS_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return _mm512_fmadd_ps(a, b, c);
}
MOEKERNELS_INLINE VecF times_power_of_2(VecF x, VecF n) {
  return _mm512_scalef_ps(x, n);
}
MOEKERNELS_INLINE VecF sqrt(VecF x) {
  return _mm512_sqrt_ps(x);
}
MOEKERNELS_INLINE float max_of(VecF x) {  // of which none is NaN
  return _mm512_reduce_max_ps(x);
}
// A bit for each lane of a comparison.
MOEKERNELS_INLINE uint32_t mask_of(VecI comparison) {
  return _mm512_movepi32_mask(__m512i(comparison));
}
MOEKERNELS_INLINE VecF load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MOEKERNELS_INLINE void store(Float16* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// The four sums over lanes, stored to (or added to) target[0 .. 3].
MOEKERNELS_INLINE void reduce_4(VecF a, VecF b, VecF c, VecF d, float* target, bool add) {
  const VecF ab = VecF(_mm512_unpacklo_ps(a, b)) + VecF(_mm512_unpackhi_ps(a, b));
  const VecF cd = VecF(_mm512_unpacklo_ps(c, d)) + VecF(_mm512_unpackhi_ps(c, d));
  const VecF abcd = VecF(_mm512_shuffle_ps(ab, cd, 0x44)) + VecF(_mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  if (add) sum = _mm_add_ps(sum, _mm_loadu_ps(target));
  _mm_storeu_ps(target, sum);
}

#elif MOEKERNELS_VECTOR_BYTES == 32

MOEKERNELS_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return _mm256_fmadd_ps(a, b, c);
}
MOEKERNELS_INLINE VecF sqrt(VecF x) {
  return _mm256_sqrt_ps(x);
}
MOEKERNELS_INLINE float max_of(VecF x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
MOEKERNELS_INLINE uint32_t mask_of(VecI comparison) {
  return static_cast<uint32_t>(_mm256_movemask_ps(__m256(comparison)));
}
MOEKERNELS_INLINE VecF load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOEKERNELS_INLINE void store(Float16* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

MOEKERNELS_INLINE void reduce_4(VecF a, VecF b, VecF c, VecF d, float* target, bool add) {
  const VecF ab = VecF(_mm256_unpacklo_ps(a, b)) + VecF(_mm256_unpackhi_ps(a, b));
  const VecF cd = VecF(_mm256_unpacklo_ps(c, d)) + VecF(_mm256_unpackhi_ps(c, d));
  const VecF abcd = VecF(_mm256_shuffle_ps(ab, cd, 0x44)) + VecF(_mm256_shuffle_ps(ab, cd, 0xee));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  if (add) sum = _mm_add_ps(sum, _mm_loadu_ps(target));
  _mm_storeu_ps(target, sum);
}

#else

MOEKERNELS_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return a * b + c;
}
MOEKERNELS_INLINE VecF sqrt(VecF x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
MOEKERNELS_INLINE float max_of(VecF x) {
  float max = x[0];
  for (int lane = 1; lane < kLanes; ++lane) max = x[lane] > max ? x[lane] : max;
  return max;
}
MOEKERNELS_INLINE uint32_t mask_of(VecI comparison) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= (comparison[lane] != 0 ? 1u : 0u) << lane;
  return mask;
}

// Shifting a half's exponent and mantissa into a float's place leaves the exponent off by 2^112, which a
// multiplication corrects for normal and subnormal numbers alike; infinities and NaN get their exponent set.
MOEKERNELS_INLINE VecF load(const Float16* p) {
  const VecU bits = __builtin_convertvector(*reinterpret_cast<const VecHMemory*>(p), VecU);
  const VecU magnitude = (bits & 0x7fffu) << 13;
  const VecU finite = VecU(VecF(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return VecF(((bits & 0x8000u) << 16) | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
}

// Round to nearest even: normal halves by adding half a unit in integers, subnormal ones by letting a float addition
// round where the unit of the sum is the smallest half.
MOEKERNELS_INLINE void store(Float16* p, VecF v) {
  const VecU sign = VecU(v) & 0x80000000u;
  const VecU magnitude = VecU(v) ^ sign;
  const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecU subnormal = VecU(VecF(magnitude) + 0.5f) - 0x3f000000u;
  VecU half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : half;  // 65520 and up round to infinity
  half = magnitude > 0x7f800000u ? (magnitude >> 13 & 0x3ffu) | 0x7e00u : half;
  *reinterpret_cast<VecHMemory*>(p) = __builtin_convertvector(half | sign >> 16, VecH);
}

MOEKERNELS_INLINE void reduce_4(VecF a, VecF b, VecF c, VecF d, float* target, bool add) {
  const VecF ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const VecF cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  VecF sum = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  if (add) sum += load(target);
  store(target, sum);
}

#endif

#if MOEKERNELS_VECTOR_BYTES != 64
// n is integral. Two factors, as one alone could not reach the subnormal numbers.
MOEKERNELS_INLINE VecF times_power_of_2(VecF x, VecF n) {
  const VecI exponent = __builtin_convertvector(n, VecI);
  const VecI half = exponent >> 1;
  return x * VecF((half + 127) << 23) * VecF((exponent - half + 127) << 23);
}
#endif

MOEKERNELS_INLINE VecF load(const BFloat16* p) {
  return VecF(__builtin_convertvector(*reinterpret_cast<const VecHMemory*>(p), VecU) << 16);
}
MOEKERNELS_INLINE float widened(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
}
// Rounded to bfloat16, in the upper halves; the lower ones are undefined.
MOEKERNELS_INLINE VecU rounded_upper_halves(VecF v) {
  const VecU bits = VecU(v);
  const VecU quiet_nan = bits | 0x400000u;
  return v != v ? quiet_nan : bits + 0x7fffu + (bits >> 16 & 1u);
}
MOEKERNELS_INLINE void store(BFloat16* p, VecF v) {
  *reinterpret_cast<VecHMemory*>(p) = __builtin_convertvector(rounded_upper_halves(v) >> 16, VecH);
}

MOEKERNELS_INLINE float sum_of(VecF v) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

// The first n <= kLanes elements; the others load as `fill` and are not stored.
template <class T>
MOEKERNELS_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  T elements[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) elements[i] = p[i];
  VecF v = load(elements);
  for (int64_t i = n; i < kLanes; ++i) v[i] = fill;
  return v;
}
template <class T>
MOEKERNELS_INLINE void store_n(T* p, VecF v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T elements[kLanes];
  store(elements, v);
  for (int64_t i = 0; i < n; ++i) p[i] = elements[i];
}

#if MOEKERNELS_VECTOR_BYTES == 64
// The same, n <= 0 included: none.
MOEKERNELS_INLINE __mmask16 lanes_below(int64_t n) {
  return static_cast<__mmask16>(n <= 0 ? 0u : n >= kLanes ? ~0u : (1u << n) - 1);
}
MOEKERNELS_INLINE VecF load_n(const float* p, int64_t n, float fill = 0.0f) {
  return n >= kLanes ? load(p) : VecF(_mm512_mask_loadu_ps(set1(fill), lanes_below(n), p));
}
MOEKERNELS_INLINE void store_n(float* p, VecF v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  _mm512_mask_storeu_ps(p, lanes_below(n), v);
}
#endif

}  // namespace
}  // namespace moekernels::cpu
