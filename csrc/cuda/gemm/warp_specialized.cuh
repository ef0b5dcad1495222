// What the warp-specialised kernels of Hopper share: whether they were built, the ring of stages as each role sees it,
// and the way of a warp's sums to memory.
#pragma once

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

// Whether this build has code for sm_90a: CMake knows. (nvcc's own list of architectures calls sm_90, whose code is a
// trap here, by the same number.)
constexpr bool has_sm90_code() {
#if defined(MOEKERNELS_HAS_SM90A) || defined(MOEKERNELS_SIMT)
  return true;
#else
  return false;
#endif
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile of 128-byte rows under the 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzle_128(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// The ring of stages as one role sees it: where it is, and which phase of that stage's barriers comes next.
template <class Traits>
class Pipeline {
 public:
  __device__ __forceinline__ explicit Pipeline(uint32_t smem) : smem_(smem) {}

  __device__ __forceinline__ uint32_t a() const { return smem_ + stage_ * Traits::kABytes; }
  __device__ __forceinline__ uint32_t b() const { return smem_ + Traits::kBOffset + stage_ * Traits::kBBytes; }
  __device__ __forceinline__ uint32_t full() const { return smem_ + Traits::kFullOffset + stage_ * 8; }
  __device__ __forceinline__ uint32_t empty() const { return smem_ + Traits::kEmptyOffset + stage_ * 8; }

  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), parity_ ^ 1); }

  __device__ __forceinline__ void advance() {
    if (++stage_ == Traits::kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  uint32_t smem_;
  uint32_t stage_ = 0;
  uint32_t parity_ = 0;
};

// ---- sums to memory ----

// Sums leave through a slab of shared memory of the warp's own: 16 rows of 64 columns at a time, swizzled.
constexpr int kSlabColumns = 64;
constexpr uint32_t kWarpSlabBytes = 16 * 128;

// Where a warp's 16 rows go: rows `row0` and following of a contiguous matrix, as far as they lie before `row_end`.
template <class T>
struct WarpRows {
  T* matrix;
  int32_t row0;
  int32_t row_end;
  int32_t width;
};

// Rounds and stores the warp's 16 rows of kColumns columns from `first_column` on, as wgmma leaves them in acc.
template <int kColumns, int kSums, class T>
__device__ __forceinline__ void store_rows(const float (&acc)[kSums], const WarpRows<T>& to, int32_t first_column,
                                           uint32_t slab, int lane) {
  static_assert(kColumns % kSlabColumns == 0 && kSums >= kColumns / 2);
  const bool aligned = is_vec16_aligned<T>(to.matrix, to.width);
#pragma unroll
  for (int first = 0; first < kColumns; first += kSlabColumns) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 16 columns: four 8x8 matrices, the second of each pair 8 rows below the first
      uint32_t packed[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int i = (first / 8 + 2 * j) * 4 + 2 * m;
        packed[m] = pack2<T>(acc[i], acc[i + 1]);
      }
      ptx::stmatrix_x4(slab + swizzle_128(lane % 16, 2 * j + lane / 16), packed);
    }
    __syncwarp();
    const int32_t column = first_column + first + lane % 8 * Vec16<T>::kSize;
    const auto copy_out = [&](int i, auto&& store) {
      const int r = 4 * i + lane / 8;
      const uint4 piece = ptx::ld_shared_v4(slab + swizzle_128(r, lane % 8));
      const int32_t row = to.row0 + r;
      if (row < to.row_end && column < to.width) store(to.matrix + int64_t{row} * to.width + column, piece);
    };
    if (aligned) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_out(i, [](T* place, const uint4& piece) { *reinterpret_cast<uint4*>(place) = piece; });
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        copy_out(i, [&](T* place, const uint4& piece) {
#pragma unroll
          for (int c = 0; c < Vec16<T>::kSize; ++c) {
            if (column + c < to.width) place[c] = reinterpret_cast<const Vec16<T>&>(piece).values[c];
          }
        });
      }
    }
    __syncwarp();
  }
}

// Zeros to the same place.
template <int kColumns, class T>
__device__ __forceinline__ void store_zeros(const WarpRows<T>& to, int32_t first_column, int lane) {
  constexpr int kVec = Vec16<T>::kSize;
  const bool aligned = is_vec16_aligned<T>(to.matrix, to.width);
#pragma unroll 1
  for (int i = lane; i < 16 * kColumns / kVec; i += 32) {
    const int32_t row = to.row0 + i / (kColumns / kVec);
    const int32_t column = first_column + i % (kColumns / kVec) * kVec;
    if (row >= to.row_end || column >= to.width) continue;
    T* const place = to.matrix + int64_t{row} * to.width + column;
    if (aligned) {
      store_vec16(place, Vec16<T>{});
    } else {
      for (int c = 0; c < min(kVec, to.width - column); ++c) place[c] = from_float<T>(0.0f);
    }
  }
}

}  // namespace moekernels
