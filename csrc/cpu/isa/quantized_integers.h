// Codes of quantised weights as unsigned bytes, multiplied with rows of signed bytes into integers, which are exact.
//
// As in quantized_codes.h a block of codes becomes kVectors vectors in whatever order is the quickest. What a code is
// larger than its weight, kZero, is taken off again by means of the rows' sums.
#pragma once

#include "cpu/isa/simd.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

constexpr int kVectorBytes = 4 * kLanes;

typedef uint32_t VecUBytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

typedef uint32_t FourBytes __attribute__((aligned(1), may_alias));
typedef int32_t VecIMemory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// In a register, where the compiler would read the same memory for each use: processors load fewer vectors at a time
// than they multiply.
MOEKERNELS_INLINE VecU loaded_once(VecU v) {
#if MOEKERNELS_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#endif
  return v;
}

// 4-bit codes in halves (CodeOrder::kHalves).
struct NibbleIntegers {
  static constexpr int kVectors = 2, kLaneWeights = 8, kZero = 8;
  static constexpr bool kInOrder = false;
  static constexpr int kBlockBytes = kVectorBytes;

  // Which weight of a block is in byte `byte` of vector s. Four bytes that are multiplied at once are neighbours.
  static MOEKERNELS_INLINE int weight_at(int s, int byte) { return byte / 16 * 32 + byte % 16 + 16 * s; }
  static MOEKERNELS_INLINE VecU value(const uint8_t* block, int s) {
    return *reinterpret_cast<const VecUBytes*>(block) >> 4 * s & 0x0f0f0f0fu;
  }
};

struct ByteIntegers {
  static constexpr int kVectors = 1, kLaneWeights = 4, kZero = 128;
  static constexpr bool kInOrder = true;  // weights of a block: as in memory
  static constexpr int kBlockBytes = kVectorBytes;

  static MOEKERNELS_INLINE int weight_at(int, int byte) { return byte; }
  static MOEKERNELS_INLINE VecU value(const uint8_t* block, int) {
    return *reinterpret_cast<const VecUBytes*>(block) ^ 0x80808080u;
  }
};

// sum[lane] + the products of four unsigned bytes of a with four signed ones of b. kMost is the largest of a.
template <int kMost>
MOEKERNELS_INLINE VecI dot_bytes(VecU a, VecU b, VecI sum) {
#if MOEKERNELS_NATIVE_BFLOAT16  // such processors have VNNI too
  return VecI(_mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#elif MOEKERNELS_VECTOR_BYTES >= 32
  // Sums of two products in 16 bits hold codes of 4 bits.
  if constexpr (kMost > 15) {
    const VecI high = dot_bytes<15>(a >> 4 & 0x0f0f0f0fu, b, VecI{});
    return dot_bytes<15>(a & 0x0f0f0f0fu, b, sum) + (high << 4);
  }
#if MOEKERNELS_VECTOR_BYTES == 64
  const __m512i pairs = _mm512_maddubs_epi16(__m512i(a), __m512i(b));
  return sum + VecI(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
  const __m256i pairs = _mm256_maddubs_epi16(__m256i(a), __m256i(b));
  return sum + VecI(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
#else
  for (int i = 0; i < 4; ++i) sum += VecI(a >> 8 * i & 255u) * (VecI(b << (24 - 8 * i)) >> 24);
  return sum;
#endif
}

// To the nearest integer, half-way to the even one; NaN to 0 in the lowest byte.
MOEKERNELS_INLINE VecI rounded(VecF x) {
#if MOEKERNELS_VECTOR_BYTES == 64
  return VecI(_mm512_cvtps_epi32(x));
#elif MOEKERNELS_VECTOR_BYTES == 32
  return VecI(_mm256_cvtps_epi32(x));
#else
  constexpr float kUnitIsOne = 12582912.0f;  // 1.5 * 2^23
  return x == x ? VecI(x + kUnitIsOne) - __builtin_bit_cast(int32_t, kUnitIsOne) : VecI{};
#endif
}

MOEKERNELS_INLINE void store_low_bytes(int8_t* target, VecI v) {
#if MOEKERNELS_VECTOR_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(__m512i(v)));
#else
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = static_cast<int8_t>(v[lane]);
#endif
}

MOEKERNELS_INLINE int32_t sum_of(VecI v) {
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

// The four sums over lanes.
MOEKERNELS_INLINE void reduce_4(VecI a, VecI b, VecI c, VecI d, int32_t* target) {
#if MOEKERNELS_VECTOR_BYTES == 64
  const VecI ab =
      VecI(_mm512_unpacklo_epi32(__m512i(a), __m512i(b))) + VecI(_mm512_unpackhi_epi32(__m512i(a), __m512i(b)));
  const VecI cd =
      VecI(_mm512_unpacklo_epi32(__m512i(c), __m512i(d))) + VecI(_mm512_unpackhi_epi32(__m512i(c), __m512i(d)));
  const __m512i sums = __m512i(VecI(_mm512_unpacklo_epi64(__m512i(ab), __m512i(cd))) +
                               VecI(_mm512_unpackhi_epi64(__m512i(ab), __m512i(cd))));
  const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti32x8_epi32(sums, 1));
  const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), all);
#else
  target[0] = sum_of(a);
  target[1] = sum_of(b);
  target[2] = sum_of(c);
  target[3] = sum_of(d);
#endif
}

}  // namespace
}  // namespace moekernels::cpu
