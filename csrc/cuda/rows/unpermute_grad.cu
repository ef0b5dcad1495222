// grad_out [T, H], rows [N, H], row_of_slot [T, K], token_of_row [N], weights [T, K]
//   -> grad_rows [N, H], grad_weights [T, K]
//
// One kernel, which reads grad_out and rows once and writes grad_rows once. A warp, or a block where rows are long,
// takes a token: a piece of its gradient stays in registers while each slot's row is written, weighted, and multiplied
// with the piece for the slot's sum. A row belongs to the slot that names it if token_of_row agrees. Further blocks
// look for the rows that belong to nobody, a row to a lane, and their warps fill these with zeros.
#include "common/rounding.h"
#include "cuda/rows/rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

template <class T_, int kVecSize_, int kSlots_, class Threads_>
struct UnpermuteGradTraits {
  using T = T_;
  using Vec = RowVec<T, kVecSize_>;
  using Threads = Threads_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr int kSlots = kSlots_;  // at a time
};

constexpr int kRowsPerCheck = kRowBlock;  // rows that a block looks at

struct UnpermuteGradWork {
  UnpermuteGradParams params;
  int64_t token_blocks;  // blocks before this take tokens, the others rows
};

template <class Traits>
__device__ __forceinline__ void unpermute_grad_token(const UnpermuteGradParams& params, int64_t token) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  using Threads = typename Traits::Threads;
  constexpr int64_t kStep = static_cast<int64_t>(Threads::kCount) * Traits::kVecSize;
  const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_stride;
  const int64_t first_slot = token * params.top_k;
#pragma unroll 1
  for (int first = 0; first < params.top_k; first += Traits::kSlots) {
    int64_t row[Traits::kSlots];
    float weight[Traits::kSlots];
    bool reads[Traits::kSlots];
    bool writes[Traits::kSlots];
    float sums[Traits::kSlots] = {};
#pragma unroll
    for (int s = 0; s < Traits::kSlots; ++s) {
      const bool is_slot = first + s < params.top_k;
      row[s] = is_slot ? params.row_of_slot[first_slot + first + s] : -1;
      const bool is_row = row[s] >= 0 && row[s] < params.num_rows;
      reads[s] = is_row && params.grad_weights != nullptr;
      writes[s] = is_row && params.grad_rows != nullptr && params.token_of_row[row[s]] == token;
      weight[s] = is_slot && params.weights != nullptr ? params.weights[first_slot + first + s] : 1.0f;
    }
#pragma unroll 1
    for (int64_t column = Threads::index() * Traits::kVecSize; column < params.hidden_size; column += kStep) {
      const Vec grad = load_if<Vec>(grad_out + column, true);
      Vec loaded[Traits::kSlots];
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
        loaded[s] = load_if<Vec>(static_cast<const T*>(params.rows) + row[s] * params.row_stride + column, reads[s]);
      }
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
        Vec weighted;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Traits::kVecSize; ++i) {
          const float x = to_float(grad.values[i]);
          weighted.values[i] = from_float<T>(weight[s] * x);
          sum = fmaf(x, to_float(loaded[s].values[i]), sum);
        }
        if (reads[s]) sums[s] += sum;
        if (writes[s]) {
          T* target = static_cast<T*>(params.grad_rows) + row[s] * params.hidden_size + column;
          store(target, weighted, /*streamed=*/false);
        }
      }
    }
    if (params.grad_weights == nullptr) continue;
    Threads::add_up(sums);
#pragma unroll
    for (int s = 0; s < Traits::kSlots; ++s) {
      if (Threads::index() == s && first + s < params.top_k) params.grad_weights[first_slot + first + s] = sums[s];
    }
  }
}

__device__ __forceinline__ bool belongs_to_a_slot(const UnpermuteGradParams& params, int64_t row) {
  const int64_t token = params.token_of_row[row];
  if (token < 0 || token >= params.num_tokens) return false;
  for (int k = 0; k < params.top_k; ++k) {
    if (params.row_of_slot[token * params.top_k + k] == row) return true;
  }
  return false;
}

// Zeros for those of a warp's 32 rows that belong to no slot.
template <class Traits>
__device__ __forceinline__ void zero_rows(const UnpermuteGradParams& params, int64_t first_row) {
  using T = typename Traits::T;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t my_row = first_row + lane;
  const bool mine_is_free = my_row < params.num_rows && !belongs_to_a_slot(params, my_row);
  unsigned free_rows = __ballot_sync(0xffffffffu, mine_is_free);
  const typename Traits::Vec zeros{};
  while (free_rows != 0) {
    T* target =
        static_cast<T*>(params.grad_rows) + (first_row + __ffs(static_cast<int>(free_rows)) - 1) * params.hidden_size;
    for (int64_t column = lane * Traits::kVecSize; column < params.hidden_size;
         column += kWarpSize * Traits::kVecSize) {
      store(target + column, zeros, /*streamed=*/false);
    }
    free_rows &= free_rows - 1;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kRowBlock) unpermute_grad_kernel(UnpermuteGradWork work) {
  using Threads = typename Traits::Threads;
  const UnpermuteGradParams& params = work.params;
  begin_overlapped();
  const int64_t block = blockIdx.x;
  if (block < work.token_blocks) {
    const int64_t token = block * Threads::kRowsPerBlock + threadIdx.x / Threads::kCount;
    if (token < params.num_tokens) unpermute_grad_token<Traits>(params, token);
  } else {
    zero_rows<Traits>(params, (block - work.token_blocks) * kRowsPerCheck + threadIdx.x / kWarpSize * kWarpSize);
  }
}

template <class T, int kVecSize, int kSlots>
cudaError_t launch_unpermute_grad(const UnpermuteGradParams& params, cudaStream_t stream) {
  return dispatch_row_threads(ceil_div(params.hidden_size, kVecSize), [&](auto tag) {
    using Threads = typename decltype(tag)::Type;
    using Traits = UnpermuteGradTraits<T, kVecSize, kSlots, Threads>;
    constexpr auto kKernel = unpermute_grad_kernel<Traits>;
    const UnpermuteGradWork work{params, ceil_div(params.num_tokens, Threads::kRowsPerBlock)};
    const int64_t row_blocks = params.grad_rows == nullptr ? 0 : ceil_div(params.num_rows, kRowsPerCheck);
    const int64_t blocks = work.token_blocks + row_blocks;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kRowBlock), 0, stream};
    config.overlap_previous = can_overlap_previous<kKernel>();
    return launch<kKernel>(config, work);
  });
}

}  // namespace

cudaError_t run(const UnpermuteGradParams& params, cudaStream_t stream) {
  if (params.grad_rows == nullptr && params.grad_weights == nullptr) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVecSize = Vec16<T>::kSize;
    const bool vectorized = is_vec16_aligned<T>(params.grad_out, params.grad_stride) &&
                            is_vec16_aligned<T>(params.grad_rows, params.hidden_size) &&
                            (params.grad_weights == nullptr || is_vec16_aligned<T>(params.rows, params.row_stride));
    if (!vectorized) return launch_unpermute_grad<T, 1, 4>(params, stream);
    if (params.top_k == 1) return launch_unpermute_grad<T, kVecSize, 1>(params, stream);
    if (params.top_k == 2) return launch_unpermute_grad<T, kVecSize, 2>(params, stream);
    if (params.top_k <= 4) return launch_unpermute_grad<T, kVecSize, 4>(params, stream);
    return launch_unpermute_grad<T, kVecSize, 8>(params, stream);
  });
}

}  // namespace moekernels
