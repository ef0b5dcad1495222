// Grouped GEMM for few rows per expert: the time goes into reading weights, so each is read once, with as many bytes in
// flight as the memory needs.
//
//   block = (expert that has rows, 16 * kTiles of its weight rows). Which experts have rows is read on the device, by
//   every warp for itself. The grid covers the most there can be; blocks beyond it only help to zero unused rows.
//
//   weights   global -> registers, 16 bytes per lane, kDepth chunks ahead: no shared memory, no barrier in the loop.
//             A chunk is 64 bytes of each of the block's weight rows, elements or codes (decode_weight.cuh). K is dealt
//             to the warps of a block in runs of kRun chunks, so that a block reads its rows in runs of kWarps of them.
//   tokens    global -> registers; the block's neighbours on the multiprocessor read the same ones, so L1 keeps them.
//             At most kTokens rows of the expert per pass; more rows take more passes over the weights, from L2.
//   sums      each warp over its part of K (decode_math.cuh), then through shared memory over the warps, in their
//             order. For a kind of weight the order depends on K alone.
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
#include "cuda/gemm/decode_weight.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/grouped_gemm.cuh"
#include "cuda/gemm/scheduler.cuh"

namespace moekernels {

template <class Weight_, int kTokens_, int kTiles_, int kDepth_>
struct DecodeTraits {
  using Weight = Weight_;
  using T = typename Weight::Type;
  using Math = DecodeMath<T, kTokens_, kTiles_>;
  static constexpr int kTokens = kTokens_;  // rows of an expert per pass
  static constexpr int kTiles = kTiles_;    // of 16 weight rows
  static constexpr int kDepth = kDepth_;    // chunks of weights a warp has in flight
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 2;

  static constexpr int kVec = Vec16<T>::kSize;
  static constexpr int kVectors = Weight::kVectors;        // of tokens, to a lane's 16 bytes of a weight row
  static constexpr int kPiece = kVectors * kVec;           // columns of those
  static constexpr int kChunk = 4 * kPiece;                // columns of a chunk: 64 bytes
  static constexpr int kRun = Weight::kRun;                // neighbouring chunks a warp takes
  static constexpr int kRound = kWarps * kDepth * kChunk;  // columns a block has in flight
  // Tokens come from L1 or L2: fewer vectors ahead, where there are many of them.
  static constexpr int kTokenDepth = Math::kTokenVectors == 1 ? 2 : 1;
  // A lane's only token is read at an address that it keeps, where that saves more than the registers cost.
  static constexpr bool kTokenAddresses = kVectors > 1 && Math::kTokenVectors == 1;
  static constexpr int kFragments = kTiles * (kTokens / 8) * 4;  // sums per lane

  static_assert(kTokens % 8 == 0);
  static_assert(kDepth % kRun == 0 && kDepth * kVectors % kTokenDepth == 0);

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
  using Rows = typename Traits::Weight::template Rows<Traits::kTiles>;
  using Tokens = uint4[Math::kTokenVectors];

  // Where a token is: its address at `column`, or null for zeros; or its number in p.rows, or -1.
  using TokenPlace = std::conditional_t<Traits::kTokenAddresses, const T*, int32_t>;

  const GroupedGemmParams& p;
  Rows weight;
  int32_t column;  // the next one of this lane
  int32_t num_columns;
  int32_t num_tokens;
  TokenPlace token[Math::kTokenVectors];

  __device__ __forceinline__ bool is_inside(int begin) const { return column + begin < num_columns; }

  __device__ __forceinline__ void load_weights(typename Rows::Pieces& w, int chunk) const {
    const int begin = Traits::chunk_begin(chunk);
    weight.load(w, column, begin, is_inside(begin));
  }

  __device__ __forceinline__ void open_weights(typename Rows::Pieces& w, int chunk) const {
    const int begin = Traits::chunk_begin(chunk);
    weight.open(w, column + begin, is_inside(begin));
  }

  // Those that a vector of weights is multiplied with; vectors are counted over the chunks.
  __device__ __forceinline__ void load_tokens(Tokens& x, int vector) const {
    const int begin = Traits::chunk_begin(vector / Traits::kVectors) + vector % Traits::kVectors * Traits::kVec;
    const bool inside = is_inside(begin);
#pragma unroll
    for (int i = 0; i < Math::kTokenVectors; ++i) {
      if (i > 0 && Math::first_token(i) >= num_tokens) break;
      if constexpr (Traits::kTokenAddresses) {
        x[i] = inside && token[i] != nullptr ? ptx::ld_global_v4_keep(token[i] + begin) : uint4{0, 0, 0, 0};
      } else {
        const T* const row = static_cast<const T*>(p.rows) + token[i] * p.row_stride;
        x[i] = inside && token[i] >= 0 ? ptx::ld_global_v4_keep(row + column + begin) : uint4{0, 0, 0, 0};
      }
    }
  }

  // Where the tokens of this lane are: a load that the first weights do not wait for.
  __device__ __forceinline__ void find_tokens(int32_t row_begin, int lane) {
#pragma unroll
    for (int i = 0; i < Math::kTokenVectors; ++i) {
      const int number = Math::token(i, lane);
      const int32_t source = number < num_tokens ? source_row(p, row_begin + number) : -1;
      if constexpr (Traits::kTokenAddresses) {
        token[i] = source < 0 ? nullptr : static_cast<const T*>(p.rows) + source * p.row_stride + column;
      } else {
        token[i] = source;
      }
    }
  }

  __device__ __forceinline__ void run(Math& math, int32_t row_begin, int lane) {
    constexpr int kDepth = Traits::kDepth;
    constexpr int kTokenDepth = Traits::kTokenDepth;
    typename Rows::Pieces pieces[kDepth];
    Tokens x[kTokenDepth];
#pragma unroll
    for (int u = 0; u < kDepth; ++u) load_weights(pieces[u], u);
    find_tokens(row_begin, lane);
#pragma unroll
    for (int v = 0; v < kTokenDepth; ++v) load_tokens(x[v], v);
#pragma unroll 1
    for (const int32_t end = num_columns + column; column < end; column += Traits::kRound) {
#pragma unroll
      for (int u = 0; u < kDepth; ++u) {
        open_weights(pieces[u], u);
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) {
          const int vector = u * Traits::kVectors + v;
          uint4 w[Traits::kTiles][2];
          weight.operands(pieces[u], v, w);
          math.multiply(w, x[vector % kTokenDepth], num_tokens);
          if (v == Traits::kVectors - 1) load_weights(pieces[u], u + kDepth);
          load_tokens(x[vector % kTokenDepth], vector + kTokenDepth);
        }
      }
      weight.advance(Traits::kRound);
      if constexpr (Traits::kTokenAddresses) token[0] += token[0] != nullptr ? Traits::kRound : 0;
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
    grouped_gemm_decode_kernel(typename Traits::Weight::Params params) {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  __shared__ float partials[Traits::kWarps][Traits::kFragments][32];
  const GroupedGemmParams& p = Traits::Weight::gemm(params);
  begin_overlapped();

  const ExpertRows found = nth_expert_with_rows(p, static_cast<int>(blockIdx.y));
  if (found.expert >= 0) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const auto width = static_cast<int32_t>(p.gated ? p.out_features / 2 : p.out_features);
    const int col_begin = static_cast<int>(blockIdx.x) * (p.gated ? 8 : 16) * Traits::kTiles;
    const int32_t column = warp * Traits::kRun * Traits::kChunk + lane % 4 * Traits::kPiece;
    const auto row_of = [&](int m, int half) {
      const int col = col_begin + (p.gated ? 8 * m : 16 * m + 8 * half) + lane / 4;
      return min(col, width - 1) + (p.gated && half == 1 ? width : 0);
    };

#pragma unroll 1
    for (int32_t row_begin = found.rows.begin; row_begin < found.rows.end; row_begin += Traits::kTokens) {
      const int32_t num_tokens = min(Traits::kTokens, found.rows.end - row_begin);
      const auto num_columns = static_cast<int32_t>(p.in_features);
      DecodeWarp<Traits> share{p, {params, found.expert, column, row_of}, column, num_columns, num_tokens, {}};
      Math math;
      math.clear();
      share.run(math, row_begin, lane);
      math.finish(lane);
#pragma unroll
      for (int f = 0; f < Traits::kFragments; ++f) {
        partials[warp][f][lane] = math.sum(f / 4 / (Traits::kTokens / 8), f / 4 % (Traits::kTokens / 8), f % 4);
      }
      __syncthreads();
      store_decode_block<Traits>(p, partials, found.expert, row_begin, num_tokens, col_begin);
      __syncthreads();  // before the next pass writes `partials`
    }
  }
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  zero_unused_rows<T>(p, block * Traits::kThreads + threadIdx.x,
                      static_cast<int64_t>(gridDim.x) * gridDim.y * Traits::kThreads);
}

template <class Traits>
cudaError_t launch_decode(const typename Traits::Weight::Params& params, const GroupedGemmParams& gemm,
                          cudaStream_t stream) {
  constexpr auto kKernel = grouped_gemm_decode_kernel<Traits>;
  constexpr int64_t kMost = INT32_MAX - 2 * Traits::kRound;  // rows and columns are counted in 32 bits
  if (std::max({gemm.num_rows, gemm.in_features, gemm.out_features}) > kMost) return cudaErrorInvalidValue;
  const int64_t cols_per_block = (gemm.gated ? 8 : 16) * Traits::kTiles;
  const int64_t col_blocks = ceil_div(output_width(gemm), cols_per_block);
  const int64_t experts = std::min<int64_t>(gemm.num_experts, gemm.num_rows);  // that may have rows
  const dim3 grid(static_cast<unsigned>(col_blocks), static_cast<unsigned>(experts));
  LaunchConfig config{grid, dim3(Traits::kThreads), 0, stream};
  config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(config, params);
}

// One kind of weight; cudaErrorInvalidValue for a configuration that is not built, or a problem it cannot serve.
template <class Weight>
cudaError_t launch_decode_of(const typename Weight::Params& params, const TileConfig& config, cudaStream_t stream) {
  using T = typename Weight::Type;
  const GroupedGemmParams& gemm = Weight::gemm(params);
  constexpr int kPiece = Weight::kVectors * Vec16<T>::kSize;
  const bool possible = has_aligned_rows(gemm) && gemm.in_features % kPiece == 0 && !gemm.transposed;
  if (!possible || !Weight::is_served(params)) return cudaErrorInvalidValue;
  const auto fits = [&config](auto traits) {
    using Traits = decltype(traits);
    return config.tile_m == Traits::kTokens && config.tile_n == 16 * Traits::kTiles && config.tile_k == Traits::kRound;
  };
  constexpr int kDepth = Weight::kDepth;
  if constexpr (std::is_same_v<T, float>) {
    using Float = DecodeTraits<Weight, 8, 1, kDepth>;
    if (fits(Float{})) return launch_decode<Float>(params, gemm, stream);
  } else {
    using Wide = DecodeTraits<Weight, 8, 2, kDepth>;
    using Fine = DecodeTraits<Weight, 8, 1, 2 * kDepth>;
    using Tall = DecodeTraits<Weight, 32, Weight::kTallTiles, kDepth / Weight::kTallTiles>;
    if (fits(Wide{})) return launch_decode<Wide>(params, gemm, stream);
    if (fits(Fine{})) return launch_decode<Fine>(params, gemm, stream);
    if (fits(Tall{})) return launch_decode<Tall>(params, gemm, stream);
  }
  return cudaErrorInvalidValue;
}

#define MOEKERNELS_INSTANCE(Weight) \
  template cudaError_t launch_decode_of<Weight>(const typename Weight::Params&, const TileConfig&, cudaStream_t)
extern MOEKERNELS_INSTANCE(PlainWeight<__nv_bfloat16>);
extern MOEKERNELS_INSTANCE(PlainWeight<__half>);
extern MOEKERNELS_INSTANCE(PlainWeight<float>);
extern MOEKERNELS_INSTANCE(HalvesWeight<__nv_bfloat16>);
extern MOEKERNELS_INSTANCE(HalvesWeight<__half>);
extern MOEKERNELS_INSTANCE(HalvesWeight<float>);
extern MOEKERNELS_INSTANCE(PairsWeight<__nv_bfloat16>);
extern MOEKERNELS_INSTANCE(PairsWeight<__half>);
extern MOEKERNELS_INSTANCE(PairsWeight<float>);
extern MOEKERNELS_INSTANCE(BytesWeight<__nv_bfloat16>);
extern MOEKERNELS_INSTANCE(BytesWeight<__half>);
extern MOEKERNELS_INSTANCE(BytesWeight<float>);

}  // namespace moekernels
