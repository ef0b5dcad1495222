// activation:      linear [N, 2F] or [N, F] -> out [N, F]
// activation_grad: grad_out [N, F], linear -> grad_linear, scaled [N, F], grad_scale [N]
//
// Forward, a warp makes a piece of an output row, as in permute. Backward, a warp or a block takes a whole row, which
// it has to sum: few loads a thread under way, but many threads. Both compute in float32 and round once.
#include "common/rounding.h"
#include "cuda/common/activations.cuh"
#include "cuda/rows/rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// Pieces of kVectors vectors of kVecSize elements for each thread; of gate and value where `gated`.
template <class T_, int kVecSize_, bool kGated_>
struct ActivationTraits {
  using T = T_;
  using Vec = RowVec<T, kVecSize_>;
  static constexpr int kVecSize = kVecSize_;
  static constexpr bool kGated = kGated_;
  static constexpr int kVectors = kGated ? 2 : 4;
  static constexpr int64_t kPiece = static_cast<int64_t>(kVectors) * kWarpSize * kVecSize;
};

// kVecSize columns of a gated row: their gates and their values, or, interleaved, the first and the second half of the
// pairs of both. `order` makes one of the other, and `pairs` undoes it.
template <class Vec, int kVecSize>
struct GatedVecs {
  Vec first, second;

  __device__ __forceinline__ GatedVecs order(bool interleaved) const {
    if (!interleaved) return *this;
    GatedVecs ordered;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      ordered.first.values[i] = at(2 * i);
      ordered.second.values[i] = at(2 * i + 1);
    }
    return ordered;
  }
  __device__ __forceinline__ GatedVecs pairs(bool interleaved) const {
    if (!interleaved) return *this;
    GatedVecs paired;
#pragma unroll
    for (int i = 0; i < 2 * kVecSize; ++i) {
      Vec& half = i < kVecSize ? paired.first : paired.second;
      half.values[i % kVecSize] = i % 2 == 0 ? first.values[i / 2] : second.values[i / 2];
    }
    return paired;
  }

 private:
  __device__ __forceinline__ auto at(int i) const {
    return i < kVecSize ? first.values[i] : second.values[i - kVecSize];
  }
};

// Where the two vectors of a column begin.
template <class Params>
__device__ __forceinline__ bool is_interleaved(const Params& p) {
  return p.activation == Activation::kSwiglu && p.swiglu.interleaved;
}
__device__ __forceinline__ int64_t first_of(int64_t column, bool interleaved) {
  return interleaved ? 2 * column : column;
}
__device__ __forceinline__ int64_t second_of(int64_t column, int64_t width, int vec_size, bool interleaved) {
  return interleaved ? 2 * column + vec_size : width + column;
}

template <class Traits>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams params) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  begin_overlapped();
  const int64_t row_pieces = ceil_div(params.width, Traits::kPiece);
  const int64_t num_pieces = params.num_rows * row_pieces;
  [[maybe_unused]] const bool interleaved = is_interleaved(params);
  const bool streamed = params.num_rows * params.width * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
  dispatch_any_activation(params.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    for (int64_t piece = first_piece(); piece < num_pieces; piece += piece_stride()) {
      const int64_t row = piece / row_pieces;
      const int64_t first_column =
          piece % row_pieces * Traits::kPiece + static_cast<int>(threadIdx.x % kWarpSize) * Traits::kVecSize;
      const T* gate = static_cast<const T*>(params.linear) + row * params.width * (Traits::kGated ? 2 : 1);
      T* target = static_cast<T*>(params.out) + row * params.width;
      Vec gates[Traits::kVectors];
      [[maybe_unused]] Vec values[Traits::kVectors];
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
        const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
        if constexpr (Traits::kGated) {
          const int64_t second = second_of(column, params.width, Traits::kVecSize, interleaved);
          gates[v] = load_if<Vec>(gate + first_of(column, interleaved), column < params.width);
          values[v] = load_if<Vec>(gate + second, column < params.width);
        } else {
          gates[v] = load_if<Vec>(gate + column, column < params.width);
        }
      }
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
        const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
        if (column >= params.width) continue;
        Vec out;
        if constexpr (Traits::kGated) {
          const auto both = GatedVecs<Vec, Traits::kVecSize>{gates[v], values[v]}.order(interleaved);
#pragma unroll
          for (int i = 0; i < Traits::kVecSize; ++i) {
            out.values[i] = from_float<T>(activate_gated<kActivation>(params.swiglu, to_float(both.first.values[i]),
                                                                      to_float(both.second.values[i])));
          }
        } else {
#pragma unroll
          for (int i = 0; i < Traits::kVecSize; ++i) {
            out.values[i] = from_float<T>(activate<kActivation>(to_float(gates[v].values[i])));
          }
        }
        store(target + column, out, streamed);
      }
    }
  });
}

template <class T, int kVecSize, bool kGated>
cudaError_t launch_activation(const ActivationParams& params, cudaStream_t stream) {
  using Traits = ActivationTraits<T, kVecSize, kGated>;
  const int64_t num_pieces = params.num_rows * ceil_div(params.width, Traits::kPiece);
  return launch_warps<activation_kernel<Traits>>(num_pieces, params, stream);
}

// ---- backward ----

template <class T_, int kVecSize_, bool kGated_, class Threads_>
struct ActivationGradTraits {
  using T = T_;
  using Vec = RowVec<T, kVecSize_>;
  using Threads = Threads_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr bool kGated = kGated_;
};

// One row. Outputs may lie where inputs do: a thread reads its elements before it writes in their place.
template <class Traits, Activation kActivation>
__device__ __forceinline__ void activation_grad_row(const ActivationGradParams& params, int64_t row) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  using Threads = typename Traits::Threads;
  const int64_t width = params.width;
  const int64_t first_linear = row * width * (Traits::kGated ? 2 : 1);
  const T* gate = static_cast<const T*>(params.linear) + first_linear;
  const T* grad_out = static_cast<const T*>(params.grad_out) + row * width;
  T* grad_gate = static_cast<T*>(params.grad_linear) + first_linear;
  T* scaled = params.scaled == nullptr ? nullptr : static_cast<T*>(params.scaled) + row * width;
  const float scale = params.row_scale == nullptr ? 1.0f : params.row_scale[row];
  const bool interleaved = is_interleaved(params);
  float sums[1] = {};
  constexpr int64_t kStep = static_cast<int64_t>(Threads::kCount) * Traits::kVecSize;
#pragma unroll 1
  for (int64_t column = Threads::index() * Traits::kVecSize; column < width; column += kStep) {
    const int64_t first = Traits::kGated ? first_of(column, interleaved) : column;
    [[maybe_unused]] const int64_t second = second_of(column, width, Traits::kVecSize, interleaved);
    GatedVecs<Vec, Traits::kVecSize> linear;
    linear.first = load_writable<Vec>(gate + first);
    const Vec grads = load_writable<Vec>(grad_out + column);
    if constexpr (Traits::kGated) {
      linear.second = load_writable<Vec>(gate + second);
      linear = linear.order(interleaved);
    }
    GatedVecs<Vec, Traits::kVecSize> linear_grads;
    Vec outputs;
#pragma unroll
    for (int i = 0; i < Traits::kVecSize; ++i) {
      const float grad = to_float(grads.values[i]);
      float out;
      if constexpr (Traits::kGated) {
        const GatedSlopes slopes = gated_with_slopes<kActivation>(params.swiglu, to_float(linear.first.values[i]),
                                                                  to_float(linear.second.values[i]));
        out = slopes.out;
        linear_grads.first.values[i] = from_float<T>(scale * grad * slopes.by_gate);
        linear_grads.second.values[i] = from_float<T>(scale * grad * slopes.by_value);
      } else {
        const ValueAndSlope act = activate_with_slope<kActivation>(to_float(linear.first.values[i]));
        out = act.value;
        linear_grads.first.values[i] = from_float<T>(scale * grad * act.slope);
      }
      outputs.values[i] = from_float<T>(scale * out);
      sums[0] = fmaf(grad, out, sums[0]);
    }
    if constexpr (Traits::kGated) linear_grads = linear_grads.pairs(interleaved);
    store(grad_gate + first, linear_grads.first, /*streamed=*/false);
    if constexpr (Traits::kGated) store(grad_gate + second, linear_grads.second, /*streamed=*/false);
    if (scaled != nullptr) store(scaled + column, outputs, /*streamed=*/false);
  }
  if (params.grad_scale == nullptr) return;
  Threads::add_up(sums);
  if (Threads::index() == 0) params.grad_scale[row] = sums[0];
}

template <class Traits>
__device__ __forceinline__ void zero_row(const ActivationGradParams& params, int64_t row) {
  using T = typename Traits::T;
  using Threads = typename Traits::Threads;
  constexpr int64_t kStep = static_cast<int64_t>(Threads::kCount) * Traits::kVecSize;
  const int64_t linear_width = params.width * (Traits::kGated ? 2 : 1);
  const typename Traits::Vec zeros{};
  for (int64_t column = Threads::index() * Traits::kVecSize; column < linear_width; column += kStep) {
    store(static_cast<T*>(params.grad_linear) + row * linear_width + column, zeros, /*streamed=*/false);
    if (params.scaled != nullptr && column < params.width) {
      store(static_cast<T*>(params.scaled) + row * params.width + column, zeros, /*streamed=*/false);
    }
  }
  if (params.grad_scale != nullptr && Threads::index() == 0) params.grad_scale[row] = 0.0f;
}

template <class Traits>
__global__ void __launch_bounds__(kRowBlock, 6) activation_grad_kernel(ActivationGradParams params) {
  using Threads = typename Traits::Threads;
  begin_overlapped();
  const int64_t used =
      params.expert_offsets == nullptr ? params.num_rows : int64_t{params.expert_offsets[params.num_experts]};
  dispatch_any_activation(params.activation, [&](auto tag) {
    for (int64_t row = Threads::first_row(); row < params.num_rows; row += Threads::row_stride()) {
      if (row < used) {
        activation_grad_row<Traits, decltype(tag)::value>(params, row);
      } else {
        zero_row<Traits>(params, row);
      }
    }
  });
}

template <class T, int kVecSize, bool kGated>
cudaError_t launch_activation_grad(const ActivationGradParams& params, cudaStream_t stream) {
  return dispatch_row_threads(ceil_div(params.width, kVecSize), [&](auto tag) {
    using Threads = typename decltype(tag)::Type;
    using Traits = ActivationGradTraits<T, kVecSize, kGated, Threads>;
    return launch_rows<activation_grad_kernel<Traits>, Threads>(params.num_rows, params, stream);
  });
}

}  // namespace

cudaError_t run(const ActivationParams& params, cudaStream_t stream) {
  if (params.num_rows <= 0 || params.width <= 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool vectorized =
        is_vec16_aligned<T>(params.linear, params.width) && is_vec16_aligned<T>(params.out, params.width);
    return dispatch_bool(params.gated, [&](auto gated) {
      constexpr bool kGated = decltype(gated)::value;
      return vectorized ? launch_activation<T, Vec16<T>::kSize, kGated>(params, stream)
                        : launch_activation<T, 1, kGated>(params, stream);
    });
  });
}

cudaError_t run(const ActivationGradParams& params, cudaStream_t stream) {
  if (params.num_rows <= 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    bool vectorized = true;
    for (const void* matrix : {params.grad_out, params.linear, const_cast<const void*>(params.grad_linear),
                               const_cast<const void*>(params.scaled)}) {
      vectorized = vectorized && is_vec16_aligned<T>(matrix, params.width);
    }
    return dispatch_bool(params.gated, [&](auto gated) {
      constexpr bool kGated = decltype(gated)::value;
      return vectorized ? launch_activation_grad<T, Vec16<T>::kSize, kGated>(params, stream)
                        : launch_activation_grad<T, 1, kGated>(params, stream);
    });
  });
}

}  // namespace moekernels
