// activation:      linear [N, 2F] or [N, F] -> out [N, F]
// activation_grad: grad_out [N, F], linear -> grad_linear, scaled [N, F], grad_scale [N]
//
// Forward, a warp makes a piece of an output row, as in permute. Backward, a warp or a block takes a whole row, which
// it has to sum: few loads a thread under way, but many threads. Both compute in float32 and round once.
#include "activations.cuh"
#include "moekernels/cuda.h"
#include "rows.cuh"

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

template <class Traits>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams params) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  begin_overlapped();
  const int64_t row_pieces = ceil_div(params.width, Traits::kPiece);
  const int64_t num_pieces = params.num_rows * row_pieces;
  const bool streamed = params.num_rows * params.width * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
  dispatch_activation(params.activation, [&](auto tag) {
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
        gates[v] = load_if<Vec>(gate + column, column < params.width);
        if constexpr (Traits::kGated) {
          values[v] = load_if<Vec>(gate + params.width + column, column < params.width);
        }
      }
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
        const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
        if (column >= params.width) continue;
        Vec out;
#pragma unroll
        for (int i = 0; i < Traits::kVecSize; ++i) {
          float x = activate<kActivation>(to_float(gates[v].values[i]));
          if constexpr (Traits::kGated) x *= to_float(values[v].values[i]);
          out.values[i] = from_float<T>(x);
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
  float sums[1] = {};
  constexpr int64_t kStep = static_cast<int64_t>(Threads::kCount) * Traits::kVecSize;
#pragma unroll 1
  for (int64_t column = Threads::index() * Traits::kVecSize; column < width; column += kStep) {
    const Vec gates = load_writable<Vec>(gate + column);
    const Vec grads = load_writable<Vec>(grad_out + column);
    [[maybe_unused]] Vec values;
    if constexpr (Traits::kGated) values = load_writable<Vec>(gate + width + column);
    [[maybe_unused]] Vec value_grads;
    Vec gate_grads;
    Vec outputs;
#pragma unroll
    for (int i = 0; i < Traits::kVecSize; ++i) {
      auto [out, slope] = activate_with_slope<kActivation>(to_float(gates.values[i]));
      const float grad = to_float(grads.values[i]);
      if constexpr (Traits::kGated) {
        value_grads.values[i] = from_float<T>(scale * grad * out);
        const float value = to_float(values.values[i]);
        out *= value;
        slope *= value;
      }
      gate_grads.values[i] = from_float<T>(scale * grad * slope);
      outputs.values[i] = from_float<T>(scale * out);
      sums[0] = fmaf(grad, out, sums[0]);
    }
    store(grad_gate + column, gate_grads, /*streamed=*/false);
    if constexpr (Traits::kGated) store(grad_gate + width + column, value_grads, /*streamed=*/false);
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
  dispatch_activation(params.activation, [&](auto tag) {
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

cudaError_t activation_cuda(const ActivationParams& params, cudaStream_t stream) {
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

cudaError_t activation_grad_cuda(const ActivationGradParams& params, cudaStream_t stream) {
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
