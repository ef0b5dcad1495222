// Codes of quantised weights as pairs of bfloat16, which are multiplied as they are (AVX512_BF16).
//
// The same as quantized_codes.h in half as many vectors. Integers are exact in bfloat16; a table is rounded to it, as a
// dequantised weight would be. Scales stay outside of the products.
#pragma once

#include "cpu/isa/dot.h"
#include "cpu/isa/quantized_codes.h"

#if MOEKERNELS_NATIVE_BFLOAT16
namespace moekernels::cpu {
namespace {

// What a block of codes is multiplied with and how.
struct BFloat16Pairs {
  using Dot = DotBFloat16Native;
  static constexpr int kVectorWeights = 2 * kLanes;
  static constexpr float kUnit = 1.0f;
};

// Four codes in each 16-bit word, looked up by shifts of such words.
template <CodeOrder kOrder>
struct NibblePairs : BFloat16Pairs {
  using Block = __m512i;
  static constexpr int kVectors = 4, kLaneWeights = 8;
  static constexpr int kBlockBytes = 64;

  explicit NibblePairs(const QuantizedWeightParams& w) {
    const float* values = w.table == nullptr ? kSignedNibbles : w.table;
    alignas(64) BFloat16 table[2 * kLanes];
    // Twice, as the lowest bit of the next code is part of an index.
    store(table, load(values));
    store(table + kLanes, load(values));
    table_ = _mm512_load_si512(table);
  }

  // Which weight of a block is in word `word` of vector s.
  static MOEKERNELS_INLINE int weight_at(int s, int word) {
    if constexpr (kOrder == CodeOrder::kPairs) return 4 * word + (s ^ 1);
    return word / 8 * 32 + word % 8 * 2 + s / 2 + s % 2 * 16;
  }

  MOEKERNELS_INLINE Block block(const uint8_t* p) const { return _mm512_loadu_si512(p); }
  MOEKERNELS_INLINE VecU value(Block block, int s) const {
    return VecU(_mm512_permutexvar_epi16(s == 0 ? block : _mm512_srli_epi16(block, 4 * s), table_));
  }

 private:
  __m512i table_;
};

template <int kRuns>
struct BytePairs : BFloat16Pairs {
  using Block = const uint8_t*;
  static constexpr int kVectors = kRuns, kLaneWeights = 0;
  static constexpr int kBlockBytes = kRuns * kVectorWeights;

  explicit BytePairs(const QuantizedWeightParams&) {}
  static MOEKERNELS_INLINE int weight_at(int s, int word) { return s * kVectorWeights + word; }
  MOEKERNELS_INLINE Block block(const uint8_t* p) const { return p; }
  MOEKERNELS_INLINE VecU value(Block block, int s) const {
    const uint8_t* p = block + s * kVectorWeights;
    const VecF low = __builtin_convertvector(load_signed_bytes(p), VecF);
    const VecF high = __builtin_convertvector(load_signed_bytes(p + kLanes), VecF);
    return VecU(_mm512_cvtne2ps_pbh(high, low));
  }
};

}  // namespace
}  // namespace moekernels::cpu
#endif
