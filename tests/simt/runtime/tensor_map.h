// What the emulator keeps in the 128 opaque bytes of a CUtensorMap.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace simt {

struct TensorMap {
  uint64_t magic;
  unsigned char* base;
  uint32_t rank;
  uint32_t element_bytes;
  uint64_t dims[5];
  uint64_t strides[5];  // in bytes; strides[0] is element_bytes
  uint32_t box[5];
  uint32_t swizzle;  // CUtensorMapSwizzle

  static constexpr uint64_t kMagic = 0x70614D726F736E54;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// The byte address that a swizzle of 32, 64 or 128 bytes puts `address` at; 0: none. Bits 4 .. of the address are
// flipped by the bits from 7 on: 1, 2 or 3 of them.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle_bytes) {
  if (swizzle_bytes == 0) return address;
  return address ^ ((address >> 7 & (swizzle_bytes / 16 - 1)) << 4);
}

}  // namespace simt
