// How a dot product along K is taken, for each dtype: what packed rows look like, how a vector of weights becomes an
// operand, and how many elements make one step.
//
//   DotFloat32         float32 weights, float32 rows
//   DotBFloat16        bfloat16 weights widened in registers, rows widened when packed
//   DotFloat16         the same for float16
//   DotBFloat16Native  pairs of bfloat16 multiplied as they are stored (AVX512_BF16)
#pragma once

#include "cpu/isa/simd.h"

namespace moekernels::cpu {
namespace {

// Rows that are multiplied with four weight rows at a time: as many as there are registers for sums and operands.
constexpr int kMostTileRows = MOEKERNELS_VECTOR_BYTES == 64 ? 6 : MOEKERNELS_VECTOR_BYTES == 32 ? 3 : 2;

struct DotFloat32 {
  using Weight = float;
  using Packed = float;
  using Operand = VecF;
  static constexpr int kStep = kLanes;  // elements of K per step
  static constexpr int kVectors = 1;    // operands per step
  static constexpr int kChunk = 512;    // elements of K summed in registers before lanes are added up
  static constexpr int kTileRows = kMostTileRows;

  static MOEKERNELS_INLINE Operand weight(const Weight* p, int) { return load(p); }
  static MOEKERNELS_INLINE Operand packed(const Packed* p, int) { return load(p); }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) { return fma(a, b, c); }
  static MOEKERNELS_INLINE void pack(const Weight* p, Packed* target) { store(target, load(p)); }
};

// A register of 32-bit words holds two bfloat16 each. The even ones, shifted up, and the odd ones, masked, are float32:
// one instruction per operand and no shuffle. Rows are packed in the same order: first the even elements of a step,
// then the odd ones.
struct DotBFloat16 {
  using Weight = BFloat16;
  using Packed = float;
  using Operand = VecF;
  static constexpr int kStep = 2 * kLanes;
  static constexpr int kVectors = 2;
  static constexpr int kChunk = 512;
  static constexpr int kTileRows = MOEKERNELS_VECTOR_BYTES == 64 ? 5 : kMostTileRows;  // a mask takes a register

  static MOEKERNELS_INLINE Operand weight(const Weight* p, int vector) {
    const VecU words = *reinterpret_cast<const VecUMemory*>(p);
    return vector == 0 ? VecF(words << 16) : VecF(words & 0xffff0000u);
  }
  static MOEKERNELS_INLINE Operand packed(const Packed* p, int vector) {
    VecF v = load(p + vector * kLanes);
#if MOEKERNELS_VECTOR_BYTES == 64
    asm("" : "+v"(v));  // GCC would load it again for each weight
#endif
    return v;
  }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) { return fma(a, b, c); }
  static MOEKERNELS_INLINE void pack(const Weight* p, Packed* target) {
    store(target, weight(p, 0));
    store(target + kLanes, weight(p, 1));
  }
};

struct DotFloat16 {
  using Weight = Float16;
  using Packed = float;
  using Operand = VecF;
  static constexpr int kStep = kLanes;
  static constexpr int kVectors = 1;
  static constexpr int kChunk = 512;
  static constexpr int kTileRows = kMostTileRows;

  static MOEKERNELS_INLINE Operand weight(const Weight* p, int) { return load(p); }
  static MOEKERNELS_INLINE Operand packed(const Packed* p, int) { return load(p); }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) { return fma(a, b, c); }
  static MOEKERNELS_INLINE void pack(const Weight* p, Packed* target) { store(target, load(p)); }
};

#if MOEKERNELS_NATIVE_BFLOAT16
struct DotBFloat16Native {
  using Weight = BFloat16;
  using Packed = BFloat16;
  using Operand = VecU;
  static constexpr int kStep = 2 * kLanes;
  static constexpr int kVectors = 1;
  static constexpr int kChunk = 1024;
  static constexpr int kTileRows = kMostTileRows;

  static MOEKERNELS_INLINE Operand weight(const Weight* p, int) { return *reinterpret_cast<const VecUMemory*>(p); }
  static MOEKERNELS_INLINE Operand packed(const Packed* p, int) { return weight(p, 0); }
  static MOEKERNELS_INLINE VecF multiply_add(Operand a, Operand b, VecF c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static MOEKERNELS_INLINE void pack(const Weight* p, Packed* target) {
    *reinterpret_cast<VecUMemory*>(target) = weight(p, 0);
  }
};
#endif

}  // namespace
}  // namespace moekernels::cpu
