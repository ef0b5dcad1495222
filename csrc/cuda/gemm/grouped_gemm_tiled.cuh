// The frame of the sm_80 and float32 grouped GEMMs: everything but the multiplication itself.
//
// A persistent block takes tiles of kTileM rows times 128 weight rows from the schedule. Per tile:
//   1. TileLoaders gather the rows (through token_of_row) and the weight rows. A gated tile's lower 64 weight rows are
//      gates and its upper 64 the values of the same columns. A transposed weight is N-major, and an
//      MnMajorLoader fetches 128 columns of each.
//   2. The stages are multiplied as mainloop.cuh says.
//   3. Where the sums pass through shared memory, a gate meets its value, and each thread finishes 8 neighbouring
//      columns of a row with 16-byte stores.
//
// Shared memory: [stages: rows, weights][tile starts]; the slab of step 3 lies over the stages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/rounding.h"
#include "cuda/common/launch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/expert_weight.cuh"
#include "cuda/gemm/grouped_gemm.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/scheduler.cuh"

namespace moekernels {

// Bias, activation, gate, scale and store for the slab's rows: slab row i holds row `row_of(i)`, none if negative.
template <class Traits, class RowOf>
__device__ __forceinline__ void finish_slab(const GroupedGemmParams& p, const float* slab, const Tile& tile,
                                            RowOf&& row_of) {
  using T = typename Traits::T;
  constexpr int kCols = 8;  // of each thread
  const int64_t width = output_width(p);
  const int tile_cols = p.gated ? kTiledN / 2 : kTiledN;
  const int threads_per_row = tile_cols / kCols;
  const int tile_col = static_cast<int>(threadIdx.x) % threads_per_row * kCols;
  const int64_t col = static_cast<int64_t>(tile.col_tile) * tile_cols + tile_col;
  if (col >= width) return;

  const Bias<T, Traits::kTables> bias(p, tile.expert);
  float col_bias[kCols];
  float value_bias[kCols];
#pragma unroll
  for (int j = 0; j < kCols; ++j) {
    const bool inside = col + j < width;
    col_bias[j] = inside ? bias[col + j] : 0.0f;
    value_bias[j] = inside && p.gated ? bias[width + col + j] : 0.0f;
  }

  const bool aligned = is_vec16_aligned<T>(p.out, width);
  const int row_step = Traits::kThreads / threads_per_row;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / threads_per_row; i < kSlabRows; i += row_step) {
    const int32_t row = row_of(i);
    if (row < 0) continue;
    const float* const sums = slab + i * kSlabPitch + tile_col;
    const float scale = row_scale(p, row);
    float out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) out[j] = sums[j] + col_bias[j];
    dispatch_activation(p.activation, [&](auto activation) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) out[j] = activate<decltype(activation)::value>(out[j]);
    });
    if (p.gated) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) out[j] *= sums[kTiledN / 2 + j] + value_bias[j];
    }
#pragma unroll
    for (int j = 0; j < kCols; ++j) out[j] *= scale;
    store_columns(static_cast<T*>(p.out) + row * width, col, width, aligned, out);
  }
}

// The weight row that is row r of a tile which has weight rows as its columns.
__device__ __forceinline__ int64_t feature_of(const GroupedGemmParams& p, const Tile& tile, int r) {
  const int64_t width = output_width(p);
  const int tile_cols = p.gated ? kTiledN / 2 : kTiledN;
  const int64_t tile_col = static_cast<int64_t>(tile.col_tile) * tile_cols + r % tile_cols;
  const int64_t col = min(tile_col, width - 1);  // past the end: any weights will do, nobody stores their sums
  return r < tile_cols ? col : width + col;
}

// What copies a tile's weights: a function of the step and of where the stages are.
template <class Traits>
__device__ __forceinline__ auto weight_loader(const GroupedGemmParams& p, const Tile& tile) {
  using T = typename Traits::T;
  const ExpertWeight<T, Traits::kTables> weight(p, tile.expert);
  const auto in_features = static_cast<int>(p.in_features);
  if constexpr (Traits::kTransposed) {
    using Loader = MnMajorLoader<T, kTiledN, Traits::kThreads, Traits::kAligned>;
    const Loader loader(weight.any(), tile.col_tile * kTiledN, static_cast<int32_t>(p.out_features));
    return [=](int step, uint32_t stages) {
      loader.load(Traits::weights_tile(stages, step), [&](int i) -> const T* {
        const int k = step * Traits::kTileK + Loader::row(i);
        return k < in_features ? weight.row(k) : nullptr;
      });
    };
  } else {
    TileLoader<T, kTiledN, Traits::kThreads, Traits::kAligned, /*kMayLackRows=*/false> loader;
    loader.start(weight.any(), [&](int r) -> const T* { return weight.row(feature_of(p, tile, r)); });
    return [=](int step, uint32_t stages) {
      loader.load(Traits::weights_tile(stages, step), step * Traits::kTileK, in_features);
    };
  }
}

template <class Traits, class Params>
__device__ __forceinline__ void compute_tile(const Params& params, const Tile& tile, unsigned char* smem) {
  using T = typename Traits::T;
  const GroupedGemmParams& p = gemm_of(params);
  TileLoader<T, Traits::kTileM, Traits::kThreads, Traits::kAligned, /*kMayLackRows=*/true> rows;
  rows.start(readable_weight<T, Traits::kTables>(params, tile.expert), [&](int r) -> const T* {
    const int32_t row = tile.row_begin + r;
    const int32_t source = row < tile.row_end ? source_row(p, row) : -1;
    return source < 0 ? nullptr : static_cast<const T*>(p.rows) + source * p.row_stride;
  });
  auto load_weights = weight_loader<Traits>(params, tile);

  const auto in_features = static_cast<int>(p.in_features);
  const int num_steps = ceil_div(in_features, Traits::kTileK);
  const uint32_t stages = ptx::smem_address(smem);
  const auto load = [&](int step, uint32_t stage) {
    rows.load(stage, step * Traits::kTileK, in_features);
    load_weights(step, stages);
  };
  typename Traits::Compute compute;
  if constexpr (Traits::kCoded) {
    multiply_steps<Traits>(compute, stages, num_steps, load, [&](int step) { load_weights.widen(step, stages); });
  } else {
    multiply_steps<Traits>(compute, stages, num_steps, load);
  }

  auto* const slab = reinterpret_cast<float*>(smem);
  finish_passes<Traits>(compute, slab, [&](auto row_of) {
    finish_slab<Traits>(p, slab, tile, [&](int slab_row) {
      const int32_t row = tile.row_begin + row_of(slab_row);
      return row < tile.row_end ? row : -1;
    });
  });
  __syncthreads();  // the slab has been read: the next tile may fill the stages
}

// The body of a kernel.
template <class Traits, class Params>
__device__ __forceinline__ void run_tiled_gemm(const Params& params, int group_m, unsigned char* smem) {
  const GroupedGemmParams& p = gemm_of(params);
  auto* const starts = reinterpret_cast<int32_t*>(smem + Traits::kSmemBytes);
  if (threadIdx.x < 32) TileSchedule::build(starts, p.expert_offsets, p.num_experts, p.num_rows, Traits::kTileM);
  __syncthreads();
  const int tile_cols = p.gated ? kTiledN / 2 : kTiledN;
  const auto col_tiles = static_cast<int32_t>(ceil_div(output_width(p), tile_cols));
  const TileSchedule schedule(starts, p.expert_offsets, p.num_experts, p.num_rows, Traits::kTileM, col_tiles, group_m);
  const auto first = static_cast<int32_t>(blockIdx.x);
  const auto step = static_cast<int32_t>(gridDim.x);
  for (int32_t i = first; i < schedule.num_tiles(); i += step) compute_tile<Traits>(params, schedule.tile(i), smem);

  zero_unused_rows<typename Traits::T>(p, static_cast<int64_t>(first) * Traits::kThreads + threadIdx.x,
                                       static_cast<int64_t>(step) * Traits::kThreads);
}

template <class Traits, auto kKernel, class Params>
cudaError_t launch_tiled_gemm(const Params& params, const TileConfig& config, cudaStream_t stream) {
  const GroupedGemmParams& p = gemm_of(params);
  DeviceInfo device;
  if (const cudaError_t error = device_info(&device); error != cudaSuccess) return error;
  const int tile_cols = p.gated ? kTiledN / 2 : kTiledN;
  const int64_t col_tiles = ceil_div(output_width(p), tile_cols);
  const int64_t tiles = max_row_tiles(p.num_rows, p.num_experts, Traits::kTileM) * col_tiles;
  const int64_t widest = std::max(p.in_features, p.transposed ? p.out_features : 0);
  if (tiles > INT32_MAX || widest > INT32_MAX - kTiledN) return cudaErrorInvalidValue;
  const int64_t resident = static_cast<int64_t>(device.sm_count) * Traits::Compute::kBlocksPerSm;
  const size_t smem_bytes = Traits::kSmemBytes + TileSchedule::smem_bytes(p.num_experts);
  const LaunchConfig launch_config{dim3(static_cast<unsigned>(std::min(tiles, resident))), dim3(Traits::kThreads),
                                   smem_bytes, stream};
  return launch<kKernel>(launch_config, params, config.group_m);
}

}  // namespace moekernels
