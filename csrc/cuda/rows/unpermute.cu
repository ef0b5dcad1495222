// rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H]
//
// Bound by memory. A warp makes a piece of an output row, kVectors neighbouring vectors to a lane, and has all of its
// loads under way before it uses the first. Nothing is summed across threads: a token's slots are added in order, in
// float32 registers.
#include "common/rounding.h"
#include "cuda/rows/rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// kSlots slots at a time, kVectors vectors of kVecSize elements each: kSlots * kVectors loads under way per lane.
template <class T_, int kVecSize_, int kSlots_, int kVectors_>
struct UnpermuteTraits {
  using T = T_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kVectors = kVectors_;

  using Vec = RowVec<T, kVecSize>;
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 3) unpermute_kernel(UnpermuteParams params) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  constexpr int64_t kPiece = static_cast<int64_t>(Traits::kVectors) * kWarpSize * Traits::kVecSize;
  begin_overlapped();
  const int64_t row_pieces = ceil_div(params.hidden_size, kPiece);
  const int64_t num_pieces = params.num_tokens * row_pieces;
  for (int64_t piece = first_piece(); piece < num_pieces; piece += piece_stride()) {
    const int64_t token = piece / row_pieces;
    const int64_t first_column =
        piece % row_pieces * kPiece + static_cast<int>(threadIdx.x % kWarpSize) * Traits::kVecSize;
    const int32_t* row_of_slot = params.row_of_slot + token * params.top_k;
    const float* weights = params.weights == nullptr ? nullptr : params.weights + token * params.top_k;

    float sums[Traits::kVectors][Traits::kVecSize] = {};
    for (int first = 0; first < params.top_k; first += Traits::kSlots) {
      float weight[Traits::kSlots];
      Vec loaded[Traits::kSlots][Traits::kVectors];
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
        const int k = first + s;
        const int64_t row = k < params.top_k ? row_of_slot[k] : -1;
        const bool kept = row >= 0 && row < params.num_rows;
        weight[s] = weights != nullptr && k < params.top_k ? weights[k] : 1.0f;
        if (!kept) weight[s] = 0.0f;
        const T* source = static_cast<const T*>(params.rows) + row * params.row_stride;
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) {
          const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
          loaded[s][v] = load_if<Vec>(source + column, kept && column < params.hidden_size);
        }
      }
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < Traits::kVecSize; ++i) {
            sums[v][i] = fmaf(weight[s], to_float(loaded[s][v].values[i]), sums[v][i]);
          }
        }
      }
    }

    T* target = static_cast<T*>(params.out) + token * params.hidden_size;
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
      if (column >= params.hidden_size) continue;
      Vec sum;
#pragma unroll
      for (int i = 0; i < Traits::kVecSize; ++i) sum.values[i] = from_float<T>(sums[v][i]);
      store(target + column, sum, /*streamed=*/false);
    }
  }
}

template <class T, int kVecSize, int kSlots, int kVectors>
cudaError_t launch_unpermute(const UnpermuteParams& params, cudaStream_t stream) {
  using Traits = UnpermuteTraits<T, kVecSize, kSlots, kVectors>;
  const int64_t row_pieces = ceil_div(params.hidden_size, Traits::kVectors * kWarpSize * Traits::kVecSize);
  return launch_warps<unpermute_kernel<Traits>>(params.num_tokens * row_pieces, params, stream);
}

}  // namespace

cudaError_t run(const UnpermuteParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 0 || params.hidden_size <= 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVecSize = Vec16<T>::kSize;
    const bool vectorized =
        is_vec16_aligned<T>(params.rows, params.row_stride) && is_vec16_aligned<T>(params.out, params.hidden_size);
    if (!vectorized) return launch_unpermute<T, 1, 4, 2>(params, stream);
    if (params.top_k == 1) return launch_unpermute<T, kVecSize, 1, 4>(params, stream);
    if (params.top_k == 2) return launch_unpermute<T, kVecSize, 2, 2>(params, stream);
    if (params.top_k <= 4) return launch_unpermute<T, kVecSize, 4, 1>(params, stream);
    return launch_unpermute<T, kVecSize, 8, 1>(params, stream);
  });
}

}  // namespace moekernels
