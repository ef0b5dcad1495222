// Which weight gradient runs, and with which tiles: as tile_config.h does for the grouped GEMM.
//
// A tile is tile_m out_features times tile_n in_features of one expert; tile_k is the rows of a stage. Every expert has
// all its tiles, so their number is known; how many rows each sums over is not, and has no part in the choice.
#pragma once

#include "common/rounding.h"
#include "cuda/gemm/tile_config.h"

namespace moekernels {

// M, N, K as in params.h: N rows, M out_features, K in_features.
struct WeightGradProblem {
  int64_t num_rows;  // the upper bound
  int64_t out_features;
  int64_t in_features;
  int32_t num_experts;
  DType dtype;
  bool aligned;  // grad_rows and rows: 16-byte aligned, and so is every row of theirs
  bool allow_tf32;
  int compute_capability;  // 80, 86, 90, ...
  int sm_count;
};

// Whether every row of `grad_rows` and `rows` starts at a multiple of 16 bytes.
inline bool has_aligned_rows(const GroupedWeightGradParams& p) {
  const auto is_aligned = [&p](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size_of(p.dtype) % 16 == 0;
  };
  return is_aligned(p.grad_rows, p.grad_row_stride) && is_aligned(p.rows, p.row_stride);
}

inline WeightGradProblem weight_grad_problem(const GroupedWeightGradParams& p, int compute_capability, int sm_count) {
  return {p.num_rows,          p.out_features, p.in_features,      p.num_experts, p.dtype,
          has_aligned_rows(p), p.allow_tf32,   compute_capability, sm_count};
}

inline int64_t weight_grad_tiles(const WeightGradProblem& p, int64_t tile_m, int64_t tile_n) {
  const int64_t row_tiles = ceil_div(p.out_features, tile_m);
  return p.num_experts * row_tiles * ceil_div(p.in_features, tile_n);
}

// Rows that are not aligned go through registers, one element at a time, and only by the small tile.
inline TileConfig weight_grad_sm80_config(const WeightGradProblem& p) {
  const bool large = p.aligned && p.out_features > 64 && weight_grad_tiles(p, 128, 128) >= p.sm_count;
  if (p.dtype == DType::kFloat32 && !p.allow_tf32) {
    return {GemmPath::kF32, large ? 128 : 64, 128, kTileK32Bit, large ? 3 : 4, /*group_m=*/1};
  }
  const int tile_k = p.dtype == DType::kFloat32 ? kTileK32Bit : kTileK16Bit;
  const bool few_stages = large && has_small_smem(p.compute_capability);
  return {GemmPath::kSm80, large ? 128 : 64, 128, tile_k, few_stages ? 3 : 4, 1};
}

inline TileConfig choose_weight_grad_config(const WeightGradProblem& p) {
  const bool hopper = p.compute_capability == 90 && p.aligned && p.dtype != DType::kFloat32 && p.num_rows > 0;
  if (!hopper) return weight_grad_sm80_config(p);
  // Two narrow tiles take longer than a wide one (tile_config.h): only where all of them run side by side.
  const bool wide = p.in_features > 128 && 2 * weight_grad_tiles(p, 128, 256) > p.sm_count;
  return {GemmPath::kSm90, 128, wide ? 256 : 128, 64, wide ? 4 : 6, 1};
}

}  // namespace moekernels
