// The tensor cores' number formats as floats.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace simt {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

inline float float_of_half(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

// What is left of a float when the low 13 bits are ignored.
inline float float_of_tf32(uint32_t bits) {
  return float_of_bits(bits & 0xFFFFE000u);
}

}  // namespace simt
