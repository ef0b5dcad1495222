// How a block of plan.cu ranks a chunk of positions within their bins.
//
// A warp takes kItems x 32 neighbours, counts their bins in a histogram of its own, and ranks lanes of one bin among
// themselves by __match_any_sync; then the warps' histograms are summed up in order. The row of a position is
//   starts[bin] + what earlier warps have of the bin + its rank within the warp.
#pragma once

#include <cstdint>

#include "common/rounding.h"
#include "cuda/common/launch.cuh"
#include "cuda/routing/plan_sequences.cuh"

namespace moekernels {
namespace {

template <int kThreads_, int kItems_, int kWindow_>
struct SortTraits {
  static constexpr int kThreads = kThreads_;
  static constexpr int kItems = kItems_;    // positions per thread and chunk
  static constexpr int kWindow = kWindow_;  // bins at a time
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kChunk = kThreads * kItems;
  static_assert(kThreads % kWarpSize == 0 && kWindow % kWarpSize == 0);
};

// What a block sorts with, for a window of `bins` bins.
template <class Traits>
struct SortMemory {
  int32_t* histograms;  // [kWarps, bins]
  int32_t* counts;      // [bins]
  int32_t* starts;      // [bins + 1]

  __device__ __forceinline__ SortMemory(unsigned char* smem, int bins)
      : histograms(reinterpret_cast<int32_t*>(smem)),
        counts(histograms + Traits::kWarps * bins),
        starts(counts + bins) {}

  static size_t bytes(int64_t num_bins) {
    const int64_t bins = num_bins < Traits::kWindow ? num_bins : Traits::kWindow;
    return static_cast<size_t>((Traits::kWarps + 2) * bins + 1) * sizeof(int32_t);
  }
};

template <class Traits>
__device__ __forceinline__ int32_t position_in_chunk(int item) {
  const int warp = threadIdx.x / kWarpSize;
  return (warp * Traits::kItems + item) * kWarpSize + threadIdx.x % kWarpSize;
}

// Ranks the positions of a warp within their bins, and leaves how many each bin has in the warp's histogram. kNoBin
// entries get no meaningful rank.
template <class Traits>
__device__ __forceinline__ void rank_in_warp(const int32_t (&bin)[Traits::kItems], int32_t* histogram, int bins,
                                             int32_t (&rank)[Traits::kItems]) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t lanes_before = (1u << lane) - 1;
  for (int b = lane; b < bins; b += kWarpSize) histogram[b] = 0;
  uint32_t peers[Traits::kItems];
#pragma unroll
  for (int i = 0; i < Traits::kItems; ++i) peers[i] = __match_any_sync(kFullWarp, bin[i]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Traits::kItems; ++i) {
    const int leader = __ffs(static_cast<int>(peers[i])) - 1;
    int32_t before = 0;
    if (lane == leader && bin[i] != kNoBin) {
      before = histogram[bin[i]];
      histogram[bin[i]] = before + __popc(peers[i]);
    }
    rank[i] = __shfl_sync(kFullWarp, before, leader) + __popc(peers[i] & lanes_before);
    __syncwarp();
  }
}

// Turns each warp's histogram into what the warps before it have, and sums all of them up in `counts`.
template <class Traits>
__device__ __forceinline__ void sum_histograms(const SortMemory<Traits>& memory, int bins) {
  constexpr int kBatch = Traits::kWarps < 8 ? Traits::kWarps : 8;  // loads under way
  for (int b = threadIdx.x; b < bins; b += Traits::kThreads) {
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < Traits::kWarps; first += kBatch) {
      int32_t* histogram = memory.histograms + first * bins + b;
      int32_t count[kBatch];
#pragma unroll
      for (int w = 0; w < kBatch; ++w) count[w] = histogram[w * bins];
#pragma unroll
      for (int w = 0; w < kBatch; ++w) {
        histogram[w * bins] = sum;
        sum += count[w];
      }
    }
    memory.counts[b] = sum;
  }
}

// starts[b] = first + counts[0] + ... + counts[b - 1] for b = 0 .. bins. By one warp.
__device__ __forceinline__ void sum_counts(const int32_t* counts, int32_t* starts, int bins, int32_t first) {
  const int lane = threadIdx.x % kWarpSize;
  const int per_lane = ceil_div(bins, kWarpSize);
  const int begin = lane * per_lane < bins ? lane * per_lane : bins;
  const int end = begin + per_lane < bins ? begin + per_lane : bins;
  int32_t own = 0;
  for (int b = begin; b < end; ++b) own += counts[b];
  int32_t up_to = own;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  int32_t row = first + up_to - own;
  for (int b = begin; b < end; ++b) {
    const int32_t count = counts[b];
    starts[b] = row;
    row += count;
  }
  if (lane == kWarpSize - 1) starts[bins] = row;
}

}  // namespace
}  // namespace moekernels
