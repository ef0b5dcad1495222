// The codes of a quantised weight, 16 bytes (a *piece*) at a time: what both kernels that read them share.
//
// `four` widens four neighbouring columns of a piece, from column 4i on; a weight is (what it says - kOffset) * scale.
// kHalf and kNested say which scales there may be beside those in float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/launch.cuh"
#include "moekernels/params.h"

namespace moekernels {

enum class Known { kNo, kYes, kAtRunTime };

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// CodeOrder::kHalves without a table: 16 bytes are 32 columns, low nibbles first. A nibble in the third byte of a
// float of 128 counts ones.
struct HalvesCodes {
  static constexpr int kColumns = 32;
  static constexpr int kBits = 4;
  static constexpr float kOffset = 128 + 8;
  static constexpr Known kHalf = Known::kYes;  // then the product with kOffset is exact
  static constexpr Known kNested = Known::kNo;

  __device__ __forceinline__ explicit HalvesCodes(const QuantizedWeightParams&) {}
  __device__ __forceinline__ void four(const uint4& piece, int i, float (&values)[4]) const {
    const uint32_t nibbles = word_of(piece, i % 4) >> (i / 4 * 4) & 0x0F0F0F0F;
#pragma unroll
    for (int b = 0; b < 4; ++b) values[b] = __uint_as_float(__byte_perm(nibbles, 0x43000000, 0x7044 | b << 8));
  }
};

// CodeOrder::kPairs: the first of two columns is in the high nibble. Every lane has one value of the table, or of
// code - 8 where there is none, and all look them up with each other; all 32 lanes come here.
class PairCodes {
 public:
  static constexpr int kColumns = 32;
  static constexpr int kBits = 4;
  static constexpr float kOffset = 0;
  static constexpr Known kHalf = Known::kNo;
  static constexpr Known kNested = Known::kAtRunTime;

  __device__ __forceinline__ explicit PairCodes(const QuantizedWeightParams& w) {
    const int code = static_cast<int>(threadIdx.x % 16);
    value_ = w.table == nullptr ? static_cast<float>(code - 8) : w.table[code];
  }
  __device__ __forceinline__ void four(const uint4& piece, int i, float (&values)[4]) const {
    const uint32_t codes = word_of(piece, i / 2) >> (i % 2 * 16);
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // of the lane's index the lowest 4 bits count
      values[c] = __shfl_sync(kFullWarp, value_, static_cast<int>(codes >> (c / 2 * 8 + (1 - c % 2) * 4)), 16);
    }
  }

 private:
  float value_;
};

// CodeOrder::kBytes.
struct ByteCodes {
  static constexpr int kColumns = 16;
  static constexpr int kBits = 8;
  static constexpr float kOffset = 0;
  static constexpr Known kHalf = Known::kAtRunTime;
  static constexpr Known kNested = Known::kNo;

  __device__ __forceinline__ explicit ByteCodes(const QuantizedWeightParams&) {}
  __device__ __forceinline__ void four(const uint4& piece, int i, float (&values)[4]) const {
#pragma unroll
    for (int b = 0; b < 4; ++b) values[b] = static_cast<float>(static_cast<int8_t>(word_of(piece, i) >> (8 * b)));
  }
};

template <class Codes_>
struct CodesTag {
  using Codes = Codes_;
};

// function(CodesTag<Codes>{}) of how codes are stored.
template <class Function>
cudaError_t dispatch_codes(CodeOrder order, Function&& function) {
  switch (order) {
    case CodeOrder::kHalves:
      return function(CodesTag<HalvesCodes>{});
    case CodeOrder::kPairs:
      return function(CodesTag<PairCodes>{});
    case CodeOrder::kBytes:
      return function(CodesTag<ByteCodes>{});
  }
  return cudaErrorInvalidValue;
}

// Whether the kernel was made for such scales and values: what the launcher asks.
template <class Codes>
bool is_known(const QuantizedWeightParams& w) {
  const auto fits = [](Known known, bool is) { return known == Known::kAtRunTime || (known == Known::kYes) == is; };
  if (w.order == CodeOrder::kHalves && w.table != nullptr) return false;
  return fits(Codes::kNested, w.map != nullptr) &&
         (w.map != nullptr || fits(Codes::kHalf, w.scales_dtype == DType::kFloat16));
}

}  // namespace moekernels
