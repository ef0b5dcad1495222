// What the kernels share that move rows: pieces of rows for warps, rows for groups of threads, loads and stores.
#pragma once

#include "common/rounding.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "cuda/ptx/ptx.cuh"

namespace moekernels {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Output of this size does not stay in the L2 cache until someone reads it: it is written past what else is there.
constexpr int64_t kStreamedBytes = 32 << 20;

// One warp for each of `num_pieces`; beyond what a grid can hold, warps take several.
template <auto kKernel, class Params>
cudaError_t launch_warps(int64_t num_pieces, const Params& params, cudaStream_t stream) {
  const int64_t blocks = ceil_div(num_pieces, kWarps);
  const unsigned grid = blocks < INT32_MAX ? static_cast<unsigned>(blocks) : INT32_MAX;
  LaunchConfig config{dim3(grid), dim3(kThreads), 0, stream};
  config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(config, params);
}

__device__ __forceinline__ int64_t first_piece() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

__device__ __forceinline__ int64_t piece_stride() {
  return static_cast<int64_t>(gridDim.x) * kWarps;
}

// ---- loads and stores; Word and Vec are 16 bytes where everything is aligned to them ----

// Zeros where `condition` does not hold; nothing is read there.
template <class Word>
__device__ __forceinline__ Word load_if(const void* pointer, bool condition) {
  Word word{};
  if constexpr (sizeof(Word) == 16) {
    *reinterpret_cast<uint4*>(&word) = ptx::ld_global_v4_if(pointer, condition);
  } else if (condition) {
    word = *static_cast<const Word*>(pointer);
  }
  return word;
}

template <class Word>
__device__ __forceinline__ void store(void* pointer, const Word& word, bool streamed) {
  if constexpr (sizeof(Word) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(&word);
    if (streamed) {
      ptx::st_global_cs_v4(pointer, bits);
    } else {
      ptx::st_global_v4(pointer, bits);
    }
  } else {
    *static_cast<Word*>(pointer) = word;
  }
}

// Neighbours of a row that are loaded together.
template <class T, int kVecSize>
struct alignas(kVecSize * sizeof(T)) RowVec {
  T values[kVecSize];
  static_assert(kVecSize == 1 || kVecSize * sizeof(T) == 16);
};

// For memory that this kernel may write: not through the read-only path, as load_if does.
template <class Vec>
__device__ __forceinline__ Vec load_writable(const void* pointer) {
  Vec vec;
  if constexpr (sizeof(Vec) == 16) {
    *reinterpret_cast<uint4*>(&vec) = *static_cast<const uint4*>(pointer);
  } else {
    vec = *static_cast<const Vec*>(pointer);
  }
  return vec;
}

// ---- rows for groups of threads ----
// A row is worked on by a warp, or by a whole block where it is long, so that few long rows keep the memory busy too.
// Which it is depends on the width alone, and so does the order of a sum over the row.

constexpr int kRowBlock = 128;

template <int kRowThreads_>
struct RowThreads {
  static constexpr int kCount = kRowThreads_;
  static_assert(kCount == kWarpSize || kCount == kRowBlock);
  static constexpr int kRowsPerBlock = kRowBlock / kCount;

  static __device__ __forceinline__ int index() { return static_cast<int>(threadIdx.x) % kCount; }
  static __device__ __forceinline__ int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kCount;
  }
  static __device__ __forceinline__ int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * kRowsPerBlock; }

  // Each of `sums` over the threads of the row, known to all of them.
  template <int kSums>
  static __device__ __forceinline__ void add_up(float (&sums)[kSums]) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], distance);
      }
    }
    if constexpr (kCount > kWarpSize) {
      constexpr int kRowWarps = kCount / kWarpSize;
      __shared__ float partial[kRowWarps][kSums];
      if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) partial[threadIdx.x / kWarpSize][s] = sums[s];
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        sums[s] = partial[0][s];
#pragma unroll
        for (int w = 1; w < kRowWarps; ++w) sums[s] += partial[w][s];
      }
      __syncthreads();  // before the next row writes there
    }
  }
};

// dispatch_row_threads(num_vectors, [&](auto tag) { using Threads = typename decltype(tag)::Type; ... });
template <class Body>
cudaError_t dispatch_row_threads(int64_t num_vectors, Body&& body) {
  if (num_vectors > 2 * kRowBlock) return body(TypeTag<RowThreads<kRowBlock>>{});
  return body(TypeTag<RowThreads<kWarpSize>>{});
}

// A group of threads for each of `num_rows`; beyond what a grid can hold, groups take several.
template <auto kKernel, class Threads, class Params>
cudaError_t launch_rows(int64_t num_rows, const Params& params, cudaStream_t stream) {
  const int64_t blocks = ceil_div(num_rows, Threads::kRowsPerBlock);
  const unsigned grid = blocks < INT32_MAX ? static_cast<unsigned>(blocks) : INT32_MAX;
  LaunchConfig config{dim3(grid), dim3(kRowBlock), 0, stream};
  config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(config, params);
}

}  // namespace moekernels
