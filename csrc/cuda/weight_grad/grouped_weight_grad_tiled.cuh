// The frame of the sm_80 and float32 weight gradients: mainloop.cuh with the rows of an expert as its K.
//
// A block makes one tile: kTileM columns of grad_rows (its rows) times 128 columns of rows. Both operands are MN-major
// (mn_major_loader.cuh). Rows gathered through an index are found a stage ahead, so that the copies of a stage need not
// wait for it. Blocks are not persistent: the tiles are as many as the host can count, and the hardware gives the next
// one to whichever multiprocessor is free, however unequal the experts are.
#pragma once

#include "common/rounding.h"
#include "cuda/common/launch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/weight_grad/grouped_weight_grad.cuh"

namespace moekernels {

// The stages of one operand, in order: columns [first_col, first_col + kCols) of rows `rows`, zeros behind them.
template <class T, int kCols, int kThreads, bool kAligned>
class RaggedLoader {
  using Loader = MnMajorLoader<T, kCols, kThreads, kAligned>;

 public:
  __device__ __forceinline__ RaggedLoader(const RaggedRows& from, const RowRange& rows, int32_t first_col,
                                          const void* readable)
      : from_(from), loader_(readable, first_col, from.width), row_(rows.begin), end_(rows.end) {
    find_rows();
  }

  __device__ __forceinline__ void load_next(uint32_t tile) {
    loader_.load(tile, [this](int i) -> const T* {
      return source_[i] < 0 ? nullptr : static_cast<const T*>(from_.data) + source_[i] * from_.stride;
    });
    row_ += MnMajorTile<T, kCols>::kRows;
    find_rows();
  }

 private:
  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < Loader::kRows; ++i) source_[i] = source_row_before(end_, from_, row_ + Loader::row(i));
  }

  RaggedRows from_;
  Loader loader_;
  int32_t row_;  // the first of the next stage
  int32_t end_;
  int32_t source_[Loader::kRows];  // of the next stage
};

// Stores the slab's sums: slab row i holds row row_of(i) of the tile.
template <class Traits, class RowOf>
__device__ __forceinline__ void store_slab(const GroupedWeightGradParams& p, const float* slab, const WeightTile& tile,
                                           RowOf&& row_of) {
  using T = typename Traits::T;
  constexpr int kCols = 8;  // of each thread
  constexpr int kThreadsPerRow = kTiledN / kCols;
  const int tile_col = static_cast<int>(threadIdx.x) % kThreadsPerRow * kCols;
  const int64_t col = tile.col + tile_col;
  T* const matrix = static_cast<T*>(p.grad_weight) + tile.expert * p.out_features * p.in_features;
  const bool aligned = is_vec16_aligned<T>(matrix, p.in_features);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kThreadsPerRow; i < kSlabRows; i += Traits::kThreads / kThreadsPerRow) {
    const int64_t row = tile.row + row_of(i);
    if (row >= p.out_features) continue;
    float out[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) out[j] = slab[i * kSlabPitch + tile_col + j];
    store_columns(matrix + row * p.in_features, col, p.in_features, aligned, out);
  }
}

// The body of a kernel.
template <class Traits>
__device__ __forceinline__ void run_tiled_weight_grad(const GroupedWeightGradParams& p, unsigned char* smem) {
  using T = typename Traits::T;
  const WeightTiles tiles(p, Traits::kTileM, kTiledN);
  const WeightTile tile = tiles.tile(static_cast<int32_t>(blockIdx.x));
  const RowRange rows = expert_rows(p.expert_offsets, tile.expert, p.num_rows);
  using GradLoader = RaggedLoader<T, Traits::kTileM, Traits::kThreads, Traits::kAligned>;
  using RowsLoader = RaggedLoader<T, kTiledN, Traits::kThreads, Traits::kAligned>;
  GradLoader grad_loader(ragged_grad_rows(p), rows, tile.row, any_address(p));
  RowsLoader rows_loader(ragged_rows(p), rows, tile.col, any_address(p));

  const int num_steps = ceil_div(rows.end - rows.begin, Traits::kTileK);
  typename Traits::Compute compute;
  multiply_steps<Traits>(compute, ptx::smem_address(smem), num_steps, [&](int, uint32_t stage) {
    grad_loader.load_next(stage);
    rows_loader.load_next(stage + Traits::kRowsBytes);
  });

  auto* const slab = reinterpret_cast<float*>(smem);
  finish_passes<Traits>(compute, slab, [&](auto row_of) { store_slab<Traits>(p, slab, tile, row_of); });
}

template <class Traits, auto kKernel>
cudaError_t launch_tiled_weight_grad(const GroupedWeightGradParams& params, cudaStream_t stream) {
  const int64_t tiles = WeightTiles(params, Traits::kTileM, kTiledN).count();
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  const LaunchConfig config{dim3(static_cast<unsigned>(tiles)), dim3(Traits::kThreads), Traits::kSmemBytes, stream};
  return launch<kKernel>(config, params);
}

}  // namespace moekernels
