// What one warp of the decode kernel does with a chunk: 64 bytes of each of 16 * kTiles weight rows, times the same
// columns of a few tokens.
//
// Lane 4g + q holds, of every row g and g + 8 of a tile, the 16 bytes at column 16q of the chunk, as they come from
// memory. Both kinds of arithmetic leave their sums as the accumulator of mma.m16n8k16, one per tile and per eight
// tokens: sum(m, n, i) belongs to weight row g + 8 (i / 2) of tile m and to token 8n + 2q + i % 2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

// 16-bit types: the weights are the A operand of mma.sync, the tokens its B. A lane's 16 bytes are eight neighbouring
// columns, while the instruction wants columns 2q, 2q + 1, 2q + 8, 2q + 9 of it. As both operands are loaded alike,
// this only reorders the columns within a sum.
template <class T, int kTokens, int kTiles>
class DecodeMath {
 public:
  static constexpr int kTokenVectors = kTokens / 8;  // token columns a lane loads: 16 bytes of each of these tokens
  static __device__ constexpr int token(int i, int lane) { return 8 * i + lane / 4; }
  static __device__ constexpr int first_token(int i) { return 8 * i; }  // the smallest over all lanes

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenVectors; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void multiply(const uint4 (&w)[kTiles][2], const uint4 (&x)[kTokenVectors],
                                           int num_tokens) {
#pragma unroll
    for (int n = 0; n < kTokenVectors; ++n) {
      if (n > 0 && first_token(n) >= num_tokens) break;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint32_t low[4] = {w[m][0].x, w[m][1].x, w[m][0].y, w[m][1].y};
        const uint32_t high[4] = {w[m][0].z, w[m][1].z, w[m][0].w, w[m][1].w};
        ptx::mma_m16n8k16<T>(sums_[m][n], low, x[n].x, x[n].y);
        ptx::mma_m16n8k16<T>(sums_[m][n], high, x[n].z, x[n].w);
      }
    }
  }

  __device__ __forceinline__ void finish(int) {}
  __device__ __forceinline__ float sum(int m, int n, int i) const { return sums_[m][n][i]; }

 private:
  float sums_[kTiles][kTokenVectors][4];
};

// float32, on the CUDA cores: a lane multiplies its four columns of two rows per tile with every token; `finish` adds
// up the four lanes of a row.
template <int kTokens, int kTiles>
class DecodeMath<float, kTokens, kTiles> {
 public:
  static_assert(kTokens == 8);
  static constexpr int kTokenVectors = kTokens;
  static __device__ constexpr int token(int i, int) { return i; }
  static __device__ constexpr int first_token(int i) { return i; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums_[m][0][t] = sums_[m][1][t] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply(const uint4 (&w)[kTiles][2], const uint4 (&x)[kTokenVectors],
                                           int num_tokens) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= num_tokens) break;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) add_product(sums_[m][half][t], w[m][half], x[t]);
      }
    }
  }

  // All 32 lanes call it.
  __device__ __forceinline__ void finish(int lane) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float mine[2] = {0.0f, 0.0f};  // of the tokens 2q and 2q + 1
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float s = sums_[m][half][t];
          s += __shfl_xor_sync(0xFFFFFFFF, s, 1);
          s += __shfl_xor_sync(0xFFFFFFFF, s, 2);
          if (t / 2 == lane % 4) mine[t % 2] = s;
        }
        sums_[m][half][0] = mine[0];
        sums_[m][half][1] = mine[1];
      }
    }
  }
  __device__ __forceinline__ float sum(int m, int, int i) const { return sums_[m][i / 2][i % 2]; }

 private:
  static __device__ __forceinline__ void add_product(float& sum, const uint4& a, const uint4& b) {
    sum = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), sum);
    sum = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), sum);
    sum = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), sum);
    sum = fmaf(__uint_as_float(a.w), __uint_as_float(b.w), sum);
  }

  float sums_[kTiles][2][kTokens];
};

}  // namespace moekernels
