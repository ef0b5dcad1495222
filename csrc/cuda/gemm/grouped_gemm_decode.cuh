// Grouped GEMM for few rows per expert: the time goes into reading weights, so each is read once, with as many bytes in
// flight as the memory needs.
//
//   block = (expert that has rows, 16 * kTiles of its weight rows). Which experts have rows is read on the device, by
//   every warp for itself. The grid covers the most there can be; blocks beyond it only help to zero unused rows.
//
//   weights   global -> registers, 16 bytes per lane, kDepth chunks ahead: no shared memory, no barrier in the loop.
//             A chunk is 64 bytes of each of the block's weight rows. K is dealt to the warps of a block in lines of
//             128 bytes, so that a block reads its rows in runs of kWarps lines.
//   tokens    global -> registers; the block's neighbours on the multiprocessor read the same ones, so L1 keeps them.
//             At most kTokens rows of the expert per pass; more rows take more passes over the weights, from L2.
//   sums      each warp over its part of K (decode_math.cuh), then through shared memory over the warps, in their
//             order. The order depends on K alone.
//
// A gated tile holds 8 gate rows and, as its second half, the 8 value rows that belong to them: both of an output are
// in one lane. A plain one holds 16 neighbouring rows. Rows past the last one repeat it, and their sums are dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/rounding.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "cuda/gemm/decode_math.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/expert_weight.cuh"
#include "cuda/gemm/grouped_gemm.cuh"
#include "cuda/gemm/scheduler.cuh"

namespace moekernels {

template <class T_, int kTokens_, int kTiles_, int kDepth_>
struct DecodeTraits {
  using T = T_;
  using Math = DecodeMath<T, kTokens_, kTiles_>;
  static constexpr int kTokens = kTokens_;  // rows of an expert per pass
  static constexpr int kTiles = kTiles_;    // of 16 weight rows
  static constexpr int kDepth = kDepth_;    // chunks of weights a warp has in flight
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 2;

  static constexpr int kVec = Vec16<T>::kSize;
  static constexpr int kChunk = 4 * kVec;                  // columns of a chunk: 64 bytes
  static constexpr int kRun = 2;                           // neighbouring chunks a warp takes: 128 bytes
  static constexpr int kRound = kWarps * kDepth * kChunk;  // columns a block has in flight
  // Tokens come from L1 or L2: fewer chunks ahead, where there are many of them.
  static constexpr int kTokenDepth = Math::kTokenVectors == 1 ? 2 : 1;
  static constexpr int kFragments = kTiles * (kTokens / 8) * 4;  // sums per lane

  static_assert(kTokens % 8 == 0);
  static_assert(kDepth % kRun == 0 && kDepth % kTokenDepth == 0);

  // Where a warp's chunk u begins, from where its chunk 0 does.
  static __device__ constexpr int chunk_begin(int u) { return (u / kRun * kWarps * kRun + u % kRun) * kChunk; }
};

struct ExpertRows {
  int expert;  // -1: there is none
  RowRange rows;
};

// The n-th expert that has rows. By a whole warp; every lane gets the answer.
__device__ __forceinline__ ExpertRows nth_expert_with_rows(const GroupedGemmParams& p, int n) {
  constexpr int kAtOnce = 4;  // loads in flight
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < p.num_experts; first += 32 * kAtOnce) {
    RowRange rows[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int expert = first + 32 * i + lane;
      rows[i] = expert < p.num_experts ? expert_rows(p.expert_offsets, expert, p.num_rows) : RowRange{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool has_rows = rows[i].begin < rows[i].end;
      const unsigned all = __ballot_sync(0xFFFFFFFF, has_rows);
      const int count = __popc(all);
      if (n < count) {
        const int before = __popc(all & ((1u << lane) - 1));
        const int owner = __ffs(__ballot_sync(0xFFFFFFFF, has_rows && before == n)) - 1;
        return {first + 32 * i + owner,
                {__shfl_sync(0xFFFFFFFF, rows[i].begin, owner), __shfl_sync(0xFFFFFFFF, rows[i].end, owner)}};
      }
      n -= count;
    }
  }
  return {-1, {0, 0}};
}

// One warp's share of K for `num_tokens` rows of an expert.
template <class Traits>
struct DecodeWarp {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  using Weights = uint4[Traits::kTiles][2];
  using Tokens = uint4[Math::kTokenVectors];

  const GroupedGemmParams& p;
  const T* weight[Traits::kTiles][2];   // row g and g + 8 of each tile, at this lane's next columns
  int32_t source[Math::kTokenVectors];  // rows of p.rows, -1: zeros
  int32_t column;                       // the next one of this lane
  int32_t num_columns;                  // K
  int32_t num_tokens;
  uint64_t policy;

  __device__ __forceinline__ void load_weights(Weights& w, int chunk) const {
    const int begin = Traits::chunk_begin(chunk);
    const bool inside = column + begin < num_columns;
#pragma unroll
    for (int m = 0; m < Traits::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[m][half] = inside ? ptx::ld_global_nc_v4_hint(weight[m][half] + begin, policy) : uint4{0, 0, 0, 0};
      }
    }
  }

  __device__ __forceinline__ void load_tokens(Tokens& x, int chunk) const {
    const int at = column + Traits::chunk_begin(chunk);
    const bool inside = at < num_columns;
#pragma unroll
    for (int i = 0; i < Math::kTokenVectors; ++i) {
      if (i > 0 && Math::first_token(i) >= num_tokens) break;
      const T* const row = static_cast<const T*>(p.rows) + source[i] * p.row_stride;
      x[i] = inside && source[i] >= 0 ? ptx::ld_global_v4_keep(row + at) : uint4{0, 0, 0, 0};
    }
  }

  // Which rows the tokens of this lane are: a load that the first weights do not wait for.
  __device__ __forceinline__ void find_tokens(int32_t row_begin, int lane) {
#pragma unroll
    for (int i = 0; i < Math::kTokenVectors; ++i) {
      const int token = Math::token(i, lane);
      source[i] = token < num_tokens ? source_row(p, row_begin + token) : -1;
    }
  }

  __device__ __forceinline__ void run(Math& math, int32_t row_begin, int lane) {
    constexpr int kDepth = Traits::kDepth;
    constexpr int kTokenDepth = Traits::kTokenDepth;
    Weights w[kDepth];
    Tokens x[kTokenDepth];
#pragma unroll
    for (int u = 0; u < kDepth; ++u) load_weights(w[u], u);
    find_tokens(row_begin, lane);
#pragma unroll
    for (int u = 0; u < kTokenDepth; ++u) load_tokens(x[u], u);
#pragma unroll 1
    for (const int32_t end = num_columns + column; column < end; column += Traits::kRound) {
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        math.multiply(w[u], x[u % kTokenDepth], num_tokens);
        load_weights(w[u], u + kDepth);
        load_tokens(x[u % kTokenDepth], u + kTokenDepth);
      }
#pragma unroll
      for (int m = 0; m < Traits::kTiles; ++m) {
        weight[m][0] += Traits::kRound;
        weight[m][1] += Traits::kRound;
      }
    }
  }
};

// The sums of all warps, in their order, and from them the outputs of the block.
template <class Traits>
__device__ __forceinline__ void store_decode_block(const GroupedGemmParams& p,
                                                   const float (&partials)[Traits::kWarps][Traits::kFragments][32],
                                                   int expert, int32_t row_begin, int num_tokens, int32_t col_begin) {
  using T = typename Traits::T;
  constexpr int kTokenTiles = Traits::kTokens / 8;
  const auto width = static_cast<int32_t>(p.gated ? p.out_features / 2 : p.out_features);
  const Bias<T, true> bias(p, expert);
  T* const out = static_cast<T*>(p.out);
  const int rows_per_lane = p.gated ? 1 : 2;  // outputs of a tile, for one token

  dispatch_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const int count = Traits::kTiles * kTokenTiles * rows_per_lane * 2 * 32;
    for (int item = threadIdx.x; item < count; item += Traits::kThreads) {
      const int lane = item % 32;
      const int parity = item / 32 % 2;
      const int half = item / 64 % rows_per_lane;
      const int tile = item / 64 / rows_per_lane;  // m * kTokenTiles + n
      const int token = 8 * (tile % kTokenTiles) + 2 * (lane % 4) + parity;
      const int32_t col = col_begin + 8 * (tile / kTokenTiles * rows_per_lane + half) + lane / 4;
      if (token >= num_tokens || col >= width) continue;

      const auto sum = [&](int fragment) {
        float s = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Traits::kWarps; ++warp) s += partials[warp][fragment][lane];
        return s;
      };
      const int fragment = 4 * tile + 2 * half + parity;
      float value = activate<kActivation>(sum(fragment) + bias[col]);
      if (p.gated) value *= sum(fragment + 2) + bias[width + col];
      const int64_t row = static_cast<int64_t>(row_begin) + token;
      out[row * width + col] = from_float<T>(row_scale(p, row) * value);
    }
  });
}

// rows [N, K] or gathered, weight [E, M, K]; 16-byte aligned, with rows of whole vectors of 16 bytes
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    grouped_gemm_decode_kernel(GroupedGemmParams p) {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  __shared__ float partials[Traits::kWarps][Traits::kFragments][32];
  begin_overlapped();

  const ExpertRows found = nth_expert_with_rows(p, static_cast<int>(blockIdx.y));
  if (found.expert >= 0) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const auto width = static_cast<int32_t>(p.gated ? p.out_features / 2 : p.out_features);
    const int col_begin = static_cast<int>(blockIdx.x) * (p.gated ? 8 : 16) * Traits::kTiles;
    const ExpertWeight<T, true> weight(p, found.expert);

#pragma unroll 1
    for (int32_t row_begin = found.rows.begin; row_begin < found.rows.end; row_begin += Traits::kTokens) {
      DecodeWarp<Traits> share{p};
      share.column = warp * Traits::kRun * Traits::kChunk + lane % 4 * Traits::kVec;
      share.num_columns = static_cast<int32_t>(p.in_features);
      share.num_tokens = min(Traits::kTokens, found.rows.end - row_begin);
      share.policy = ptx::createpolicy_evict_first();
#pragma unroll
      for (int m = 0; m < Traits::kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int col = col_begin + (p.gated ? 8 * m : 16 * m + 8 * half) + lane / 4;
          const int32_t row = min(col, width - 1) + (p.gated && half == 1 ? width : 0);
          share.weight[m][half] = weight.row(row) + share.column;
        }
      }
      Math math;
      math.clear();
      share.run(math, row_begin, lane);
      math.finish(lane);
#pragma unroll
      for (int f = 0; f < Traits::kFragments; ++f) {
        partials[warp][f][lane] = math.sum(f / 4 / (Traits::kTokens / 8), f / 4 % (Traits::kTokens / 8), f % 4);
      }
      __syncthreads();
      store_decode_block<Traits>(p, partials, found.expert, row_begin, share.num_tokens, col_begin);
      __syncthreads();  // before the next pass writes `partials`
    }
  }
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  zero_unused_rows<T>(p, block * Traits::kThreads + threadIdx.x,
                      static_cast<int64_t>(gridDim.x) * gridDim.y * Traits::kThreads);
}

template <class Traits>
cudaError_t launch_decode(const GroupedGemmParams& params, cudaStream_t stream) {
  constexpr auto kKernel = grouped_gemm_decode_kernel<Traits>;
  constexpr int64_t kMost = INT32_MAX - 2 * Traits::kRound;  // rows and columns are counted in 32 bits
  if (std::max({params.num_rows, params.in_features, params.out_features}) > kMost) return cudaErrorInvalidValue;
  const int64_t cols_per_block = (params.gated ? 8 : 16) * Traits::kTiles;
  const int64_t col_blocks = ceil_div(output_width(params), cols_per_block);
  const int64_t experts = std::min<int64_t>(params.num_experts, params.num_rows);  // that may have rows
  const dim3 grid(static_cast<unsigned>(col_blocks), static_cast<unsigned>(experts));
  LaunchConfig config{grid, dim3(Traits::kThreads), 0, stream};
  config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(config, params);
}

// One dtype; cudaErrorInvalidValue for a configuration that is not built, or a problem it cannot serve.
template <class T>
cudaError_t launch_grouped_gemm_decode_dtype(const GroupedGemmParams& params, const TileConfig& config,
                                             cudaStream_t stream) {
  const bool possible = has_aligned_rows(params) && params.in_features % Vec16<T>::kSize == 0 && !params.transposed;
  if (!possible) return cudaErrorInvalidValue;
  const auto fits = [&config](auto traits) {
    using Traits = decltype(traits);
    return config.tile_m == Traits::kTokens && config.tile_n == 16 * Traits::kTiles && config.tile_k == Traits::kRound;
  };
  if constexpr (std::is_same_v<T, float>) {
    using Float = DecodeTraits<T, 8, 1, 4>;
    if (fits(Float{})) return launch_decode<Float>(params, stream);
  } else {
    using Wide = DecodeTraits<T, 8, 2, 4>;
    using Fine = DecodeTraits<T, 8, 1, 8>;
    using Tall = DecodeTraits<T, 32, 2, 2>;
    if (fits(Wide{})) return launch_decode<Wide>(params, stream);
    if (fits(Fine{})) return launch_decode<Fine>(params, stream);
    if (fits(Tall{})) return launch_decode<Tall>(params, stream);
  }
  return cudaErrorInvalidValue;
}

#define MOEKERNELS_INSTANCE(T) \
  template cudaError_t launch_grouped_gemm_decode_dtype<T>(const GroupedGemmParams&, const TileConfig&, cudaStream_t)
extern MOEKERNELS_INSTANCE(__nv_bfloat16);
extern MOEKERNELS_INSTANCE(__half);
extern MOEKERNELS_INSTANCE(float);

}  // namespace moekernels
