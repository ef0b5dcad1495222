// The paths of the grouped GEMM on a GPU, one launcher each. `choose_tile_config` says which of them serves a problem.
//
// What a path may rely on, because `run` sees to it: num_rows > 0, out_features > 0 (even when gated),
// 0 < num_experts <= kMaxExpertsPerLaunch, and everything its own branch of choose_tile_config demands. in_features may
// be 0 where that branch lets it. What a path has to do: compute the rows of all experts *and* set the rows past the
// last expert's to zero (scheduler.cuh: zero_unused_rows), with offsets clamped to [0, num_rows] (scheduler.cuh:
// expert_rows).
#pragma once

#include <cuda_runtime.h>

#include "cuda/gemm/tile_config.h"
#include "moekernels/cuda.h"

namespace moekernels {

cudaError_t launch_grouped_gemm_f32(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);
cudaError_t launch_grouped_gemm_sm80(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);
cudaError_t launch_grouped_gemm_sm90(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);
cudaError_t launch_grouped_gemm_decode(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);

// `run` with the choice made by the caller: for tests and for tuning.
cudaError_t grouped_gemm_with_config(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);

__host__ __device__ inline int64_t output_width(const GroupedGemmParams& p) {
  return p.gated ? p.out_features / 2 : p.out_features;
}

}  // namespace moekernels
