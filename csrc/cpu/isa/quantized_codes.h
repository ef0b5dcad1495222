// Codes of quantised weights as vectors of float32.
//
// For products a block of weights is loaded as it lies and becomes kVectors vectors, in whatever order of weights is
// the quickest: `weight_at` says which weight is where, and rows are packed in that order. Where a block has several
// scales, a lane has one: that of weight kLaneWeights * lane. For unpacking, `code` is the value of single codes.
#pragma once

#include "cpu/isa/dot.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

constexpr int kMostVectors = 8;  // of a block

// What the vectors of a block are multiplied with.
struct Float32Vectors {
  using Dot = DotFloat32;
  static constexpr int kVectorWeights = kLanes;
};

typedef uint8_t VecBytesMemory __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef int8_t VecSignedBytesMemory __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint32_t VecWordsMemory __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

// kLanes bytes, each in a word. Compilers convert such short vectors lane by lane.
MOEKERNELS_INLINE VecU load_bytes(const uint8_t* p) {
#if MOEKERNELS_VECTOR_BYTES == 64
  return VecU(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif MOEKERNELS_VECTOR_BYTES == 32
  return VecU(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const VecBytesMemory*>(p), VecU);
#endif
}
MOEKERNELS_INLINE VecI load_signed_bytes(const uint8_t* p) {
#if MOEKERNELS_VECTOR_BYTES == 64
  return VecI(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif MOEKERNELS_VECTOR_BYTES == 32
  return VecI(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const VecSignedBytesMemory*>(p), VecI);
#endif
}

// lanes[index[i]] for each i; only the low bits of an index count.
MOEKERNELS_INLINE VecF permute_lanes(VecF lanes, VecU index) {
#if MOEKERNELS_VECTOR_BYTES == 64
  return _mm512_permutexvar_ps(__m512i(index), lanes);
#elif MOEKERNELS_VECTOR_BYTES == 32
  return _mm256_permutevar8x32_ps(lanes, __m256i(index));
#else
  VecF result;
  for (int i = 0; i < kLanes; ++i) result[i] = lanes[index[i] % kLanes];
  return result;
#endif
}

// a0 b0 a1 b1 ...
MOEKERNELS_INLINE void interleave(VecF a, VecF b, VecF& first, VecF& second) {
#if MOEKERNELS_VECTOR_BYTES == 64
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  first = _mm512_permutex2var_ps(a, low, b);
  second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
#elif MOEKERNELS_VECTOR_BYTES == 32
  const VecF low = _mm256_unpacklo_ps(a, b);
  const VecF high = _mm256_unpackhi_ps(a, b);
  first = _mm256_permute2f128_ps(low, high, 0x20);
  second = _mm256_permute2f128_ps(low, high, 0x31);
#else
  first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// The 16 values that a 4-bit code may have.
class NibbleTable {
 public:
  explicit NibbleTable(const float* values) : values_(values) {
#if MOEKERNELS_VECTOR_BYTES >= 32
    low_ = load(values);
    high_ = load(values + 16 - kLanes);
#endif
  }

  // Of codes in the lowest 4 bits of each word, whatever the others are.
  MOEKERNELS_INLINE VecF at(VecU codes) const {
#if MOEKERNELS_VECTOR_BYTES == 64
    return permute_lanes(low_, codes);
#elif MOEKERNELS_VECTOR_BYTES == 32
    return _mm256_blendv_ps(permute_lanes(low_, codes), permute_lanes(high_, codes), VecF(codes << 28));
#else
    VecF result;
    for (int i = 0; i < kLanes; ++i) result[i] = values_[codes[i] & 15u];
    return result;
#endif
  }

 private:
  const float* values_;
  VecF low_{}, high_{};
};

// Nibbles taken apart by shifts of 32-bit words. `kOrder` says which weights a byte holds.
template <CodeOrder kOrder>
struct ShiftedNibbles : Float32Vectors {
  using Block = VecU;
  static constexpr int kVectors = 8, kLaneWeights = 8;
  static constexpr int kBlockBytes = 4 * kLanes;
  static constexpr bool kPaired = kOrder == CodeOrder::kPairs;

  // Which weight of a block is in a lane of vector s.
  static MOEKERNELS_INLINE int weight_at(int s, int lane) {
    return kPaired ? 8 * lane + (s ^ 1) : lane / 4 * 32 + lane % 4 * 4 + s / 2 + s % 2 * 16;
  }
};

// Nibbles that mean code - 8. The top bit is inverted, which makes them signed, and they are converted where the top
// nibble of a word is: 2^28 times as large.
template <CodeOrder kOrder>
struct IntegerNibbles : ShiftedNibbles<kOrder> {
  explicit IntegerNibbles(const QuantizedWeightParams&) {}
  static constexpr float kUnit = 0x1p-28f;

  MOEKERNELS_INLINE VecU block(const uint8_t* p) const {
    return *reinterpret_cast<const VecWordsMemory*>(p) ^ 0x88888888u;
  }
  MOEKERNELS_INLINE VecF value(VecU block, int s) const {
    return __builtin_convertvector(VecI(block << (28 - 4 * s) & 0xf0000000u), VecF);
  }
  MOEKERNELS_INLINE VecF code(VecU codes) const { return __builtin_convertvector(VecI(codes & 15u) - 8, VecF); }
};

constexpr float kSignedNibbles[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// Nibbles with a table of values, which is that of code - 8 where none is given.
template <CodeOrder kOrder>
struct TableNibbles : ShiftedNibbles<kOrder> {
  explicit TableNibbles(const QuantizedWeightParams& w) : table(w.table == nullptr ? kSignedNibbles : w.table) {}
  static constexpr float kUnit = 1.0f;
  const NibbleTable table;

  MOEKERNELS_INLINE VecU block(const uint8_t* p) const { return *reinterpret_cast<const VecWordsMemory*>(p); }
  MOEKERNELS_INLINE VecF value(VecU block, int s) const { return table.at(block >> 4 * s); }
  MOEKERNELS_INLINE VecF code(VecU codes) const { return table.at(codes); }
};

#if MOEKERNELS_VECTOR_BYTES == 32
// The same where 16 bytes can be looked up at once but not 16 words: a table for each byte of a float, and the bytes
// put together. kBytes says how many of a float are not zero in any value: 2 of small integers, else 4.
template <CodeOrder kOrder, int kBytes>
struct ByteTableNibbles : Float32Vectors {
  static constexpr int kVectors = 8, kLaneWeights = 8;
  static constexpr int kBlockBytes = 32;
  static constexpr bool kPaired = kOrder == CodeOrder::kPairs;
  static constexpr float kUnit = 1.0f;
  struct Block {
    VecF values[kVectors];
  };

  explicit ByteTableNibbles(const QuantizedWeightParams& w) : table(w.table == nullptr ? kSignedNibbles : w.table) {
    const float* values = w.table == nullptr ? kSignedNibbles : w.table;
    for (int byte = 0; byte < 4; ++byte) {
      alignas(32) uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) {
        bytes[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, values[i % 16]) >> 8 * byte);
      }
      bytes_[byte] = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
    }
  }

  // Instructions work on halves of a register: bytes 0 .. 15 and 16 .. 31.
  static MOEKERNELS_INLINE int weight_at(int s, int lane) {
    const int half = lane / 4, word = lane % 4;
    const int byte = 16 * half + (kBytes == 2 ? 8 * (s / 2 % 2) + 2 * word + s % 2 : 4 * (s % 4) + word);
    const bool high = s >= 4;
    return kPaired ? 2 * byte + !high : byte / 16 * 32 + byte % 16 + (high ? 16 : 0);
  }

  MOEKERNELS_INLINE Block block(const uint8_t* p) const {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    Block block;
    widen(_mm256_and_si256(codes, mask), block.values);
    widen(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), block.values + 4);
    return block;
  }
  MOEKERNELS_INLINE VecF value(const Block& block, int s) const { return block.values[s]; }
  MOEKERNELS_INLINE VecF code(VecU codes) const { return table.at(codes); }

 private:
  MOEKERNELS_INLINE void widen(__m256i codes, VecF* values) const {
    const __m256i byte2 = _mm256_shuffle_epi8(bytes_[2], codes), byte3 = _mm256_shuffle_epi8(bytes_[3], codes);
    const __m256i upper[2] = {_mm256_unpacklo_epi8(byte2, byte3), _mm256_unpackhi_epi8(byte2, byte3)};
    if constexpr (kBytes == 2) {
      for (int i = 0; i < 2; ++i) {
        values[2 * i] = VecF(VecU(upper[i]) << 16);
        values[2 * i + 1] = VecF(VecU(upper[i]) & 0xffff0000u);
      }
    } else {
      const __m256i byte0 = _mm256_shuffle_epi8(bytes_[0], codes), byte1 = _mm256_shuffle_epi8(bytes_[1], codes);
      const __m256i lower[2] = {_mm256_unpacklo_epi8(byte0, byte1), _mm256_unpackhi_epi8(byte0, byte1)};
      for (int i = 0; i < 2; ++i) {
        values[2 * i] = VecF(_mm256_unpacklo_epi16(lower[i], upper[i]));
        values[2 * i + 1] = VecF(_mm256_unpackhi_epi16(lower[i], upper[i]));
      }
    }
  }

  const NibbleTable table;
  __m256i bytes_[4];
};
#endif

// The quickest ways on this instruction set.
#if MOEKERNELS_VECTOR_BYTES == 32
template <CodeOrder kOrder>
using SmallIntegers = ByteTableNibbles<kOrder, 2>;
template <CodeOrder kOrder>
using AnyValues = ByteTableNibbles<kOrder, 4>;
#elif MOEKERNELS_VECTOR_BYTES == 64
template <CodeOrder kOrder>
using SmallIntegers = TableNibbles<kOrder>;
template <CodeOrder kOrder>
using AnyValues = TableNibbles<kOrder>;
#else
template <CodeOrder kOrder>
using SmallIntegers = IntegerNibbles<kOrder>;
template <CodeOrder kOrder>
using AnyValues = TableNibbles<kOrder>;
#endif

// Bytes, whose blocks have one scale each.
template <int kRuns>
struct SignedBytes : Float32Vectors {
  using Block = const uint8_t*;
  explicit SignedBytes(const QuantizedWeightParams&) {}
  static constexpr float kUnit = 1.0f;
  static constexpr int kVectors = kRuns, kLaneWeights = 0;
  static constexpr int kBlockBytes = kRuns * kLanes;

  static MOEKERNELS_INLINE int weight_at(int s, int lane) { return s * kLanes + lane; }
  MOEKERNELS_INLINE Block block(const uint8_t* p) const { return p; }
  MOEKERNELS_INLINE VecF value(Block block, int s) const {
    return __builtin_convertvector(load_signed_bytes(block + s * kLanes), VecF);
  }
};

}  // namespace
}  // namespace moekernels::cpu
