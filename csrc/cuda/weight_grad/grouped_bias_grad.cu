// The gradient of the biases: the sum over an expert's rows of bias_scale[i] * grad_rows[i].
//
// A block sums 8 vectors of 16 bytes of columns of one expert. Its threads are 8 across and 32 down: thread r of a
// column takes rows r, r + 32, ... in order, and then the 32 sums of a column are added in order. So the order depends
// on the number of the expert's rows alone.
#include "common/rounding.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/weight_grad/grouped_weight_grad.cuh"

namespace moekernels {
namespace {

constexpr int kThreadsAcross = 8;
constexpr int kThreadsDown = 32;
constexpr int kThreads = kThreadsAcross * kThreadsDown;

template <class T>
constexpr int kBlockCols = kThreadsAcross * Vec16<T>::kSize;

// grad_rows [N, M], bias_scale [N] -> grad_bias [E, M]
template <class T>
__global__ void __launch_bounds__(kThreads) grouped_bias_grad_kernel(GroupedWeightGradParams p) {
  constexpr int kVec = Vec16<T>::kSize;
  __shared__ float sums[kThreadsDown][kBlockCols<T>];
  const auto width = static_cast<int32_t>(p.out_features);
  const auto col_blocks = ceil_div(width, kBlockCols<T>);
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t expert = block / col_blocks;
  const int32_t first_col = block % col_blocks * kBlockCols<T>;
  const int across = static_cast<int>(threadIdx.x) % kThreadsAcross;
  const int down = static_cast<int>(threadIdx.x) / kThreadsAcross;
  const int32_t col = first_col + across * kVec;
  const int count = min(max(width - col, 0), kVec);
  const RaggedRows from = ragged_grad_rows(p);
  const bool whole = count == kVec && is_vec16_aligned<T>(from.data, from.stride);
  const RowRange rows = expert_rows(p.expert_offsets, expert, p.num_rows);

  float sum[kVec] = {};
#pragma unroll 4
  for (int32_t row = rows.begin + down; row < rows.end; row += kThreadsDown) {
    const int32_t source = source_row(from.token_of_row, from.num_source_rows, row);
    if (source < 0) continue;
    const T* const place = static_cast<const T*>(from.data) + source * from.stride + col;
    const float scale = p.bias_scale == nullptr ? 1.0f : p.bias_scale[row];
    Vec16<T> values{};
    if (whole) {
      values = load_vec16(place);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (j < count) values.values[j] = place[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] = fmaf(scale, to_float(values.values[j]), sum[j]);
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) sums[down][across * kVec + j] = sum[j];
  __syncthreads();

  const auto mine = static_cast<int32_t>(threadIdx.x);
  if (mine < kBlockCols<T> && first_col + mine < width) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kThreadsDown; ++i) total += sums[i][mine];
    static_cast<T*>(p.grad_bias)[expert * p.out_features + first_col + mine] = from_float<T>(total);
  }
}

}  // namespace

cudaError_t launch_grouped_bias_grad(const GroupedWeightGradParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t blocks = params.num_experts * ceil_div(params.out_features, kBlockCols<T>);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream};
    return launch<grouped_bias_grad_kernel<T>>(config, params);
  });
}

}  // namespace moekernels
