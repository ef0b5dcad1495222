// Rows of a quantised weight, unpacked to the dtype that they are multiplied in.
#pragma once

#include "cpu/isa/quantized_dispatch.h"
#include "cpu/isa/quantized_scales.h"

namespace moekernels::cpu {
namespace {

// A group of a row of the weight, in the order of memory: a multiple of 32 of 4-bit codes.
template <class Codes, class T>
MOEKERNELS_INLINE void unpack_group(const Codes& codes, const uint8_t* p, VecF scale, int64_t n, T* out) {
  for (int64_t k = 0; k < n; k += 32) {
    MOEKERNELS_UNROLL
    for (int i = 0; i < 16; i += kLanes) {
      const VecU bytes = load_bytes(p + k / 2 + i);
      const VecF low = codes.code(bytes) * scale, high = codes.code(bytes >> 4) * scale;
      if constexpr (Codes::kPaired) {
        VecF first, second;
        interleave(high, low, first, second);
        store(out + k + 2 * i, first);
        store(out + k + 2 * i + kLanes, second);
      } else {
        store(out + k + i, low);
        store(out + k + 16 + i, high);
      }
    }
  }
}

template <int kRuns, class T>
MOEKERNELS_INLINE void unpack_group(const SignedBytes<kRuns>& codes, const uint8_t* p, VecF scale, int64_t n, T* out) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(out + k, codes.value(p + k, 0) * scale);
  if (k < n) {
    uint8_t last[kLanes] = {};
    for (int64_t i = k; i < n; ++i) last[i - k] = p[i];
    store_n(out + k, codes.value(last, 0) * scale, n - k);
  }
}

// Two groups of 32 that follow one another.
template <class Codes, class T>
MOEKERNELS_INLINE void unpack_two_groups(const Codes& codes, const uint8_t* p, const float* scales, T* out) {
  constexpr int kCodesPerByte = Codes::kVectors * kLanes / Codes::kBlockBytes;
  unpack_group(codes, p, set1(scales[0]), 32, out);
  unpack_group(codes, p + 32 / kCodesPerByte, set1(scales[1]), 32, out + 32);
}

#if MOEKERNELS_NATIVE_BFLOAT16
constexpr VecU kSixteen = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// To bfloat16 by an instruction that takes subnormal numbers for zeros, as the products do too. A group has but 16
// values: they are scaled and rounded once, and looked up as 16-bit words.
template <CodeOrder kOrder>
MOEKERNELS_INLINE void unpack_group(const TableNibbles<kOrder>& codes, const uint8_t* p, VecF scale, int64_t n,
                                    BFloat16* out) {
  const VecF values = codes.code(kSixteen) * scale;
  const __m512i table = __m512i(_mm512_cvtne2ps_pbh(values, values));  // twice: the fifth bit of an index is any
  for (int64_t k = 0; k < n; k += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k / 2));
    __m512i index;
    if constexpr (kOrder == CodeOrder::kPairs) {  // each byte twice; at first its high nibble counts
      const __m512i twice = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), __m512i(kSixteen * 0x01010101u));
      index = _mm512_srlv_epi16(twice, _mm512_set1_epi32(4));
    } else {
      const __m512i words = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
      index = _mm512_mask_srli_epi16(words, 0xffff0000u, words, 4);
    }
    _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(index, table));
  }
}

// The groups share a table: the first 16 words are values of the first one.
MOEKERNELS_INLINE void unpack_two_groups(const TableNibbles<CodeOrder::kHalves>& codes, const uint8_t* p,
                                         const float* scales, BFloat16* out) {
  const VecF values = codes.code(kSixteen);
  const __m512i table = __m512i(_mm512_cvtne2ps_pbh(values * scales[1], values * scales[0]));
  const auto values_of = [&](const uint8_t* group, int first) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
    const __m512i nibbles = _mm512_mask_srli_epi16(words, 0xffff0000u, words, 4);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return _mm512_permutexvar_epi16(
        _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), _mm512_set1_epi16(static_cast<short>(first)), kAndOr),
        table);
  };
  _mm512_storeu_si512(out, values_of(p, 0));
  _mm512_storeu_si512(out + 32, values_of(p + 16, 16));
}

template <int kRuns>
MOEKERNELS_INLINE void unpack_group(const SignedBytes<kRuns>& codes, const uint8_t* p, VecF scale, int64_t n,
                                    BFloat16* out) {
  const auto rounded = [&](const uint8_t* bytes) {
    return _mm512_cvtne2ps_pbh(codes.value(bytes + kLanes, 0) * scale, codes.value(bytes, 0) * scale);
  };
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) _mm512_storeu_si512(out + k, __m512i(rounded(p + k)));
  if (k < n) {
    uint8_t last[2 * kLanes] = {};
    BFloat16 values[2 * kLanes];
    for (int64_t i = k; i < n; ++i) last[i - k] = p[i];
    _mm512_storeu_si512(values, __m512i(rounded(last)));
    for (int64_t i = k; i < n; ++i) out[i] = values[i - k];
  }
}
#endif

template <class Codes, class T>
void unpack_task(const QuantizedGemmParams& params, int64_t expert, int64_t row_begin, int64_t row_end, void* out,
                 int64_t stride, float* scratch) {
  constexpr int64_t kPiece = 256;  // weights whose fetching is spread over the others
  constexpr int kCodesPerByte = Codes::kVectors * kLanes / Codes::kBlockBytes;
  const QuantizedScales scales(params, expert);
  const Codes codes(params.weight);
  const int64_t n = params.gemm.in_features, row_bytes = n / kCodesPerByte;
  const int64_t step = min(params.weight.group, kPiece);
  const int shift = scales.group_shift();
  const uint8_t* row =
      static_cast<const uint8_t*>(params.weight.codes) + expert * params.weight.codes_stride + row_begin * row_bytes;
  T* target = static_cast<T*>(out);
  for (int64_t r = row_begin; r < row_end; ++r, row += row_bytes, target += stride) {
    scales.load_rows(r, 1, 1.0f, scratch);
    for (int64_t piece = 0; piece < n; piece += kPiece) {
      fetch_ahead(row + piece / kCodesPerByte + kBytesAhead, kPiece / kCodesPerByte);
      const int64_t end = min(piece + kPiece, n);
      if (step == 32) {  // known to the compiler, as it is the most frequent and has the most groups
        int64_t k = piece;
        for (; k + 64 <= end; k += 64) {
          unpack_two_groups(codes, row + k / kCodesPerByte, scratch + (k >> 5), target + k);
        }
        if (k < end) unpack_group(codes, row + k / kCodesPerByte, set1(scratch[k >> 5]), 32, target + k);
        continue;
      }
      for (int64_t k = piece; k < end; k += step) {
        unpack_group(codes, row + k / kCodesPerByte, set1(scratch[k >> shift]), min(step, end - k), target + k);
      }
    }
  }
}

void unpack_rows(const QuantizedGemmParams& params, int64_t expert, int64_t row_begin, int64_t row_end, void* out,
                 int64_t stride, float* scratch) {
  with_float_codes(params.weight, [&]<class Codes>() {
    with_dtype(params.gemm.dtype,
               [&]<class T>() { unpack_task<Codes, T>(params, expert, row_begin, row_end, out, stride, scratch); });
  });
}

}  // namespace
}  // namespace moekernels::cpu
