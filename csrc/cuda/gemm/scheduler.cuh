// Which rows belong to whom, read on the device from expert_offsets: the host never learns it.
//
// The tiles of a grouped GEMM are numbered expert by expert; experts without rows have none. A persistent kernel builds
// the schedule once per block, in shared memory, and then takes the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//
//   int32_t* const starts = ...;                        // TileSchedule::smem_bytes(num_experts) of shared memory
//   if (warp == 0) TileSchedule::build(starts, ...);    // one whole warp
//   __syncthreads();
//   const TileSchedule schedule(starts, ...);
//   for (int32_t i = blockIdx.x; i < schedule.num_tiles(); i += gridDim.x) { const Tile tile = schedule.tile(i); ... }
//
// Order within an expert: groups of `group_m` tiles of rows; in a group all columns, rows fastest. Blocks that run at
// the same time then share weights, and a group's rows stay in L2 while all columns pass.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "cuda/gemm/grouped_gemm.cuh"

namespace moekernels {

struct RowRange {
  int32_t begin, end;
};

// Clamped, so that wrong offsets give wrong results but stay inside the tensors.
__device__ __forceinline__ int32_t clamp_row(int32_t row, int64_t num_rows) {
  return row < 0 ? 0 : static_cast<int32_t>(min(static_cast<int64_t>(row), num_rows));
}

__device__ __forceinline__ RowRange expert_rows(const int32_t* expert_offsets, int expert, int64_t num_rows) {
  const int32_t begin = clamp_row(expert_offsets[expert], num_rows);
  return {begin, max(begin, clamp_row(expert_offsets[expert + 1], num_rows))};
}

// The first row no expert owns.
__device__ __forceinline__ int32_t first_unused_row(const GroupedGemmParams& p) {
  return expert_rows(p.expert_offsets, p.num_experts - 1, p.num_rows).end;
}

// The source row of packed row `row`: -1 stands for a row of zeros. Source rows are numbered in 32 bits.
__device__ __forceinline__ int32_t source_row(const int32_t* token_of_row, int64_t num_source_rows, int32_t row) {
  if (token_of_row == nullptr) return row;
  const int32_t token = token_of_row[row];
  return token >= 0 && token < num_source_rows ? token : -1;
}

__device__ __forceinline__ int32_t source_row(const GroupedGemmParams& p, int32_t row) {
  return source_row(p.token_of_row, p.num_source_rows, row);
}

struct Tile {
  int32_t expert;
  int32_t row_begin;  // rows [row_begin, row_end) of the expert, at most tile_m
  int32_t row_end;
  int32_t col_tile;  // which tile of columns
};

class TileSchedule {
 public:
  static __host__ __device__ constexpr int smem_bytes(int num_experts) {
    return (num_experts + 1) * static_cast<int>(sizeof(int32_t));
  }

  // starts[e]: the tiles of rows of all experts before e. By one whole warp; a barrier before anyone reads it.
  static __device__ __forceinline__ void build(int32_t* starts, const int32_t* expert_offsets, int num_experts,
                                               int64_t num_rows, int tile_m) {
    const int lane = threadIdx.x % 32;
    int32_t before = 0;
    for (int first = 0; first < num_experts; first += 32) {
      const int expert = first + lane;
      int32_t tiles = 0;
      if (expert < num_experts) {
        const RowRange rows = expert_rows(expert_offsets, expert, num_rows);
        tiles = (rows.end - rows.begin) / tile_m + ((rows.end - rows.begin) % tile_m != 0);
      }
      int32_t sum = tiles;  // of the lanes up to this one
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const int32_t other = __shfl_up_sync(0xFFFFFFFF, sum, delta);
        if (lane >= delta) sum += other;
      }
      if (expert < num_experts) starts[expert] = before + sum - tiles;
      before += __shfl_sync(0xFFFFFFFF, sum, 31);
    }
    if (lane == 0) starts[num_experts] = before;
  }

  __device__ __forceinline__ TileSchedule(const int32_t* starts, const int32_t* expert_offsets, int num_experts,
                                          int64_t num_rows, int tile_m, int col_tiles, int group_m)
      : starts_(starts),
        expert_offsets_(expert_offsets),
        num_rows_(num_rows),
        num_experts_(num_experts),
        tile_m_(tile_m),
        col_tiles_(col_tiles),
        group_m_(group_m) {}

  __device__ __forceinline__ int32_t num_tiles() const { return starts_[num_experts_] * col_tiles_; }

  // The same for every thread that asks.
  __device__ __forceinline__ Tile tile(int32_t index) const {
    const int32_t key = index / col_tiles_;  // tiles of rows before this one, were they taken row by row
    int low = 0;                             // the last expert whose tiles start at or before `key`
    int high = num_experts_ - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (starts_[middle] <= key) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const int32_t row_tiles = starts_[low + 1] - starts_[low];
    const int32_t within = index - starts_[low] * col_tiles_;
    const int32_t first = within / (group_m_ * col_tiles_) * group_m_;  // tile of rows at which the group starts
    const int32_t group = min(group_m_, row_tiles - first);
    const int32_t in_group = within - first * col_tiles_;

    const RowRange rows = expert_rows(expert_offsets_, low, num_rows_);
    const int32_t row_begin = rows.begin + (first + in_group % group) * tile_m_;
    return {low, row_begin, min(rows.end - row_begin, tile_m_) + row_begin, in_group / group};
  }

 private:
  const int32_t* starts_;
  const int32_t* expert_offsets_;
  int64_t num_rows_;
  int num_experts_;
  int tile_m_;
  int col_tiles_;
  int group_m_;
};

// A block among those of its cluster that share weights: the schedule's tiles are the cluster's, tile_m rows for each.
struct ClusterPlace {
  uint32_t size;  // 1: this block is alone
  uint32_t rank;

  __device__ __forceinline__ int32_t first_tile() const { return static_cast<int32_t>(blockIdx.x / size); }
  __device__ __forceinline__ int32_t tile_stride() const { return static_cast<int32_t>(gridDim.x / size); }

  // This block's rows of one of them; there may be none.
  __device__ __forceinline__ Tile own_rows(Tile tile, int tile_m) const {
    tile.row_begin += static_cast<int32_t>(rank) * tile_m;
    tile.row_end = min(tile.row_end, tile.row_begin + tile_m);
    return tile;
  }
};

// Output rows past the last expert's become zero. Every thread of the grid that takes part has a `rank` of its own.
template <class T>
__device__ __forceinline__ void zero_unused_rows(const GroupedGemmParams& p, int64_t rank, int64_t num_threads) {
  const int64_t width = output_width(p);
  T* const out = static_cast<T*>(p.out);
  const int64_t begin = first_unused_row(p) * width;
  const int64_t end = p.num_rows * width;
  if (is_vec16_aligned<T>(out, width)) {
    constexpr int kVec = Vec16<T>::kSize;
    const Vec16<T> zeros{};
    for (int64_t i = begin + rank * kVec; i < end; i += num_threads * kVec) store_vec16(out + i, zeros);
  } else {
    for (int64_t i = begin + rank; i < end; i += num_threads) out[i] = from_float<T>(0.0f);
  }
}

}  // namespace moekernels
