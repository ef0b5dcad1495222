// The paths of the weight gradient on a GPU, one launcher each. `choose_weight_grad_config` says which of them serves a
// problem.
//
// What a path may rely on, because `run` sees to it: out_features, in_features and num_experts are
// positive, no size exceeds kMostRowsOrFeatures, grad_weight is not null, and everything its own branch of
// choose_weight_grad_config demands. num_rows may be 0. What a path has to do: write every element of grad_weight,
// zeros for experts without rows, with offsets clamped to [0, num_rows] (scheduler.cuh: expert_rows).
//
// The K of a tile is its expert's rows. A stage may reach beyond them, into rows of the next expert or of nobody:
// their elements must become zero in both operands, as 0 times NaN is NaN.
#pragma once

#include <cuda_runtime.h>

#include "common/rounding.h"
#include "cuda/gemm/scheduler.cuh"
#include "cuda/weight_grad/weight_grad_config.h"
#include "moekernels/cuda.h"

namespace moekernels {

cudaError_t launch_grouped_weight_grad_f32(const GroupedWeightGradParams& params, const TileConfig& config,
                                           cudaStream_t stream);
cudaError_t launch_grouped_weight_grad_sm80(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream);
cudaError_t launch_grouped_weight_grad_sm90(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream);

// grad_bias alone.
cudaError_t launch_grouped_bias_grad(const GroupedWeightGradParams& params, cudaStream_t stream);

// `run` with the choice made by the caller: for tests and for tuning.
cudaError_t grouped_weight_grad_with_config(const GroupedWeightGradParams& params, const TileConfig& config,
                                            cudaStream_t stream);

// Rows, features and positions a little behind them are counted in 32 bits.
constexpr int64_t kMostRowsOrFeatures = INT32_MAX - 1024;

// One operand: a matrix whose rows belong to experts, in order or found through token_of_row.
struct RaggedRows {
  const void* data;
  const int32_t* token_of_row;  // nullable
  int64_t num_source_rows;
  int64_t stride;
  int32_t width;
};

__host__ __device__ inline RaggedRows ragged_grad_rows(const GroupedWeightGradParams& p) {
  return {p.grad_rows, p.grad_token_of_row, p.num_source_grad_rows, p.grad_row_stride,
          static_cast<int32_t>(p.out_features)};
}

__host__ __device__ inline RaggedRows ragged_rows(const GroupedWeightGradParams& p) {
  return {p.rows, p.token_of_row, p.num_source_rows, p.row_stride, static_cast<int32_t>(p.in_features)};
}

// The source row of packed row `row`, -1 for a row of zeros: one past `end`, or one without a token.
__device__ __forceinline__ int32_t source_row_before(int32_t end, const RaggedRows& from, int32_t row) {
  return row < end ? source_row(from.token_of_row, from.num_source_rows, row) : -1;
}

// A multiple of 16 near the output: stands in for a source where cp.async reads nothing.
__device__ __forceinline__ const void* any_address(const GroupedWeightGradParams& p) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p.grad_weight) & ~uintptr_t{15});
}

struct WeightTile {
  int32_t expert;
  int32_t row;  // the first of its rows of grad_weight[expert], and of its columns
  int32_t col;
};

// Tiles are numbered expert by expert, rows fastest: those that run together share an expert's rows.
class WeightTiles {
 public:
  __host__ __device__ WeightTiles(const GroupedWeightGradParams& p, int tile_m, int tile_n)
      : num_experts_(p.num_experts),
        row_tiles_(ceil_div(p.out_features, tile_m)),
        col_tiles_(ceil_div(p.in_features, tile_n)),
        tile_m_(tile_m),
        tile_n_(tile_n) {}

  __host__ __device__ int64_t count() const { return num_experts_ * row_tiles_ * col_tiles_; }

  __device__ __forceinline__ WeightTile tile(int32_t index) const {
    const auto row_tiles = static_cast<int32_t>(row_tiles_);
    const auto per_expert = static_cast<int32_t>(row_tiles_ * col_tiles_);
    const int32_t within = index % per_expert;
    return {index / per_expert, within % row_tiles * tile_m_, within / row_tiles * tile_n_};
  }

 private:
  int64_t num_experts_;
  int64_t row_tiles_;
  int64_t col_tiles_;
  int tile_m_;
  int tile_n_;
};

}  // namespace moekernels
