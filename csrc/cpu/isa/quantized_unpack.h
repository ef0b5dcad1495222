// Rows of a quantised weight, unpacked to the dtype that they are multiplied in.
#pragma once

#include "cpu/isa/quantized_dispatch.h"
#include "cpu/isa/quantized_scales.h"

namespace moekernels::cpu {
namespace {

template <class T>
MOEKERNELS_INLINE void store_rounded(T* p, VecF v) {
  store(p, v);
}
#if MOEKERNELS_NATIVE_BFLOAT16
// In one instruction, which takes subnormal numbers for zeros, as the products do too.
MOEKERNELS_INLINE void store_rounded(BFloat16* p, VecF v) {
  const __m512bh words = _mm512_cvtne2ps_pbh(v, v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(__m512i(words)));
}
#endif

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
        store_rounded(out + k + 2 * i, first);
        store_rounded(out + k + 2 * i + kLanes, second);
      } else {
        store_rounded(out + k + i, low);
        store_rounded(out + k + 16 + i, high);
      }
    }
  }
}

template <int kRuns, class T>
MOEKERNELS_INLINE void unpack_group(const SignedBytes<kRuns>& codes, const uint8_t* p, VecF scale, int64_t n, T* out) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store_rounded(out + k, codes.value(p + k, 0) * scale);
  if (k < n) {
    uint8_t last[kLanes] = {};
    for (int64_t i = k; i < n; ++i) last[i - k] = p[i];
    store_n(out + k, codes.value(last, 0) * scale, n - k);
  }
}

template <class Codes, class T>
void unpack_task(const QuantizedGemmParams& params, int64_t expert, int64_t row_begin, int64_t row_end, void* out,
                 float* scratch) {
  const QuantizedScales scales(params, expert);
  const Codes codes(params.weight);
  const int64_t n = params.gemm.in_features, row_bytes = n * Codes::kBlockBytes / (Codes::kVectors * kLanes);
  const int64_t group_bytes = row_bytes / scales.per_row();
  const uint8_t* matrix = static_cast<const uint8_t*>(params.weight.codes) + expert * params.weight.codes_stride;
  for (int64_t row = row_begin; row < row_end; ++row) {
    fetch_ahead(matrix + (row + 2) * row_bytes, row_bytes);
    scales.load_row(row, 1.0f, scratch);
    T* target = static_cast<T*>(out) + (row - row_begin) * n;
    for (int64_t i = 0; i < scales.per_row(); ++i) {
      const uint8_t* p = matrix + row * row_bytes + i * group_bytes;
      unpack_group(codes, p, set1(scratch[i]), params.weight.group, target + i * params.weight.group);
    }
  }
}

void unpack_rows(const QuantizedGemmParams& params, int64_t expert, int64_t row_begin, int64_t row_end, void* out,
                 float* scratch) {
  with_float_codes(params.weight, [&]<class Codes>() {
    with_dtype(params.gemm.dtype,
               [&]<class T>() { unpack_task<Codes, T>(params, expert, row_begin, row_end, out, scratch); });
  });
}

}  // namespace
}  // namespace moekernels::cpu
