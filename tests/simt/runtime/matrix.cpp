// ldmatrix, stmatrix and mma.sync: which lane holds which element.
#include <cstring>

#include "emulated.h"
#include "numbers.h"
#include "state.h"

namespace simt {
namespace {

constexpr uint32_t kFullMask = 0xFFFFFFFF;
constexpr uint32_t kRowBytes = 16;

struct MatrixLane {
  uint32_t row_address;
  uint32_t* registers;
};

uint32_t row_address(void* const data[], unsigned matrix, unsigned row) {
  return static_cast<const MatrixLane*>(data[8 * matrix + row])->row_address;
}

template <bool kTransposed>
void load_matrices(Warp&, Thread* const[], void* const data[], uint32_t) {
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t elements[8][8];
    for (unsigned r = 0; r < 8; ++r) {
      memcpy(elements[r], shared_pointer(row_address(data, m, r), kRowBytes, kRowBytes, "ldmatrix"), kRowBytes);
    }
    for (unsigned l = 0; l < kWarpSize; ++l) {
      const unsigned outer = l / 4;
      const unsigned inner = 2 * (l % 4);
      const uint32_t low = kTransposed ? elements[inner][outer] : elements[outer][inner];
      const uint32_t high = kTransposed ? elements[inner + 1][outer] : elements[outer][inner + 1];
      static_cast<const MatrixLane*>(data[l])->registers[m] = low | high << 16;
    }
  }
}

void store_matrices(Warp&, Thread* const[], void* const data[], uint32_t) {
  for (unsigned m = 0; m < 4; ++m) {
    for (unsigned l = 0; l < kWarpSize; ++l) {
      unsigned char* row = shared_pointer(row_address(data, m, l / 4), kRowBytes, kRowBytes, "stmatrix");
      memcpy(row + 4 * (l % 4), &static_cast<const MatrixLane*>(data[l])->registers[m], 4);
    }
  }
}

struct MultiplyLane {
  Element element;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// A [16, K] and B [K, 8] of the warp as floats: K = 16 of two elements per register, or K = 8 of one (tf32).
template <int kDepth>
struct Operands {
  float a[16][kDepth];
  float b[kDepth][8];
};

template <class Convert>
void gather_pairs(void* const data[], Operands<16>& out, Convert convert) {
  for (unsigned l = 0; l < kWarpSize; ++l) {
    const auto& lane = *static_cast<const MultiplyLane*>(data[l]);
    const unsigned g = l / 4;
    const unsigned q = l % 4;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned shift = 16 * half;
      for (unsigned i = 0; i < 4; ++i) {
        out.a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + half] = convert(static_cast<uint16_t>(lane.a[i] >> shift));
      }
      for (unsigned i = 0; i < 2; ++i) {
        out.b[2 * q + 8 * i + half][g] = convert(static_cast<uint16_t>(lane.b[i] >> shift));
      }
    }
  }
}

void gather_tf32(void* const data[], Operands<8>& out) {
  for (unsigned l = 0; l < kWarpSize; ++l) {
    const auto& lane = *static_cast<const MultiplyLane*>(data[l]);
    const unsigned g = l / 4;
    const unsigned q = l % 4;
    for (unsigned i = 0; i < 4; ++i) out.a[g + 8 * (i % 2)][q + 4 * (i / 2)] = float_of_tf32(lane.a[i]);
    for (unsigned i = 0; i < 2; ++i) out.b[q + 4 * i][g] = float_of_tf32(lane.b[i]);
  }
}

template <int kDepth>
void multiply(void* const data[], const Operands<kDepth>& operands) {
  for (unsigned l = 0; l < kWarpSize; ++l) {
    const auto& lane = *static_cast<const MultiplyLane*>(data[l]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = l / 4 + 8 * (i / 2);
      const unsigned column = 2 * (l % 4) + i % 2;
      float sum = lane.d[i];
      for (int k = 0; k < kDepth; ++k) sum += operands.a[row][k] * operands.b[k][column];
      lane.d[i] = sum;
    }
  }
}

void multiply_all(Warp&, Thread* const[], void* const data[], uint32_t) {
  const Element element = static_cast<const MultiplyLane*>(data[0])->element;
  if (element == Element::kTF32) {
    Operands<8> operands;
    gather_tf32(data, operands);
    multiply(data, operands);
  } else {
    Operands<16> operands;
    gather_pairs(data, operands, element == Element::kFloat16 ? float_of_half : float_of_bfloat16);
    multiply(data, operands);
  }
}

void check_whole_warp(const char* what) {
  if (self->warp->live != kFullMask) fail("%s needs all 32 lanes of the warp", what);
}

}  // namespace

void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address, bool transposed) {
  check_whole_warp("ldmatrix");
  shared_pointer(row_address, kRowBytes, kRowBytes, "ldmatrix");
  access_shared(row_address, kRowBytes, Access::kRead, "ldmatrix");
  MatrixLane lane{row_address, registers};
  if (transposed) {
    meet("ldmatrix.trans", kFullMask, &lane, load_matrices<true>);
  } else {
    meet("ldmatrix", kFullMask, &lane, load_matrices<false>);
  }
}

void stmatrix_x4(uint32_t row_address, const uint32_t (&registers)[4]) {
  check_whole_warp("stmatrix");
  shared_pointer(row_address, kRowBytes, kRowBytes, "stmatrix");
  access_shared(row_address, kRowBytes, Access::kWrite, "stmatrix");
  MatrixLane lane{row_address, const_cast<uint32_t*>(registers)};
  meet("stmatrix", kFullMask, &lane, store_matrices);
}

void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  check_whole_warp("mma.sync");
  MultiplyLane lane{element, d, a, {b0, b1}};
  meet("mma.sync", kFullMask, &lane, multiply_all);
}

}  // namespace simt
