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

// The paths that read the codes of a quantised weight.
cudaError_t launch_quantized_gemm_decode(const QuantizedGemmParams& params, const TileConfig& config,
                                         cudaStream_t stream);
cudaError_t launch_quantized_gemm_sm80(const QuantizedGemmParams& params, const TileConfig& config,
                                       cudaStream_t stream);

// `run` with the choice made by the caller: for tests and for tuning.
cudaError_t grouped_gemm_with_config(const GroupedGemmParams& params, const TileConfig& config, cudaStream_t stream);

// All but the codes.
__host__ __device__ inline const GroupedGemmParams& gemm_of(const GroupedGemmParams& p) {
  return p;
}
__host__ __device__ inline const GroupedGemmParams& gemm_of(const QuantizedGemmParams& p) {
  return p.gemm;
}

__host__ __device__ inline int64_t output_width(const GroupedGemmParams& p) {
  return p.gated ? p.out_features / 2 : p.out_features;
}

inline bool is_empty(const GroupedGemmParams& params) {
  return params.num_rows == 0 || output_width(params) == 0;
}

// What the epilogues have no registers for; see params.h.
inline bool is_beyond_epilogue(const GroupedGemmParams& params) {
  return params.activation == Activation::kRelu2 || params.activation == Activation::kSwiglu ||
         (params.transposed && params.bias != nullptr);
}

// The output where there are no experts.
inline cudaError_t store_zeros(const GroupedGemmParams& params, cudaStream_t stream) {
  const int64_t bytes = params.num_rows * output_width(params) * size_of(params.dtype);
  return cudaMemsetAsync(params.out, 0, static_cast<size_t>(bytes), stream);
}

}  // namespace moekernels
