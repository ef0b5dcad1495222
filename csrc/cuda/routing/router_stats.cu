// logits [G * S, E], mask [G * S] -> counts [G, E], prob_sums [G, E], z_sums [G], and backwards
//
// A group of S tokens is cut into pieces whose size depends on the shape alone. In the first of two kernels a block
// takes a piece: its groups of lanes share the tokens out in turn, each lane adding up its own experts in registers,
// and then their sums are added in order. A piece leaves a line of 2 E + 1 floats in the workspace: counts, prob_sums,
// z_sum. The second kernel adds the pieces of each G, again in a fixed order. The gradient has nothing to add up.
#include "common/rounding.h"
#include "cuda/routing/router_probabilities.cuh"
#include "cuda/routing/router_rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

constexpr int64_t kSmallestPiece = 32;  // tokens
constexpr int64_t kMostPieces = 1024;   // of all groups together, roughly

struct Pieces {
  int64_t tokens;     // of a piece; the last of a group may have fewer
  int64_t per_group;  // 0 where groups are empty
};

__host__ __device__ inline Pieces pieces_of(const RouterStatsParams& params) {
  if (params.num_groups <= 0 || params.group_size <= 0) return {kSmallestPiece, 0};
  const int64_t most = ceil_div(kMostPieces, params.num_groups);
  const int64_t tokens = ceil_div(params.group_size, most);
  const int64_t size = tokens < kSmallestPiece ? kSmallestPiece : tokens;
  return {size, ceil_div(params.group_size, size)};
}

__host__ __device__ inline int64_t line_size(const RouterStatsParams& params) {
  return 2 * static_cast<int64_t>(params.num_experts) + 1;
}

// The sums of the experts of one lane. `line` [2 E + 1] belongs to the lane's group.
template <class Row>
class LaneSums {  // in registers
 public:
  __device__ __forceinline__ LaneSums(float* line, int32_t num_experts) : line_(line), num_experts_(num_experts) {}

  __device__ __forceinline__ void add(int place, int, float count, float probability) {
    counts_[place] += count;
    probs_[place] += probability;
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < Row::kPlaces; ++i) {
      const int expert = Row::expert(i);
      if (expert >= num_experts_) continue;
      line_[expert] = counts_[i];
      line_[num_experts_ + expert] = probs_[i];
    }
  }

 private:
  float* line_;
  int32_t num_experts_;
  float counts_[Row::kPlaces] = {};
  float probs_[Row::kPlaces] = {};
};

template <>
class LaneSums<StreamedRow> {  // in the line itself
 public:
  __device__ __forceinline__ LaneSums(float* line, int32_t num_experts) : line_(line), num_experts_(num_experts) {
    for (int64_t e = StreamedRow::Lanes::lane(); e < num_experts; e += kWarpSize) {
      line_[e] = 0.0f;
      line_[num_experts + e] = 0.0f;
    }
  }

  __device__ __forceinline__ void add(int, int expert, float count, float probability) {
    line_[expert] += count;
    line_[static_cast<int64_t>(num_experts_) + expert] += probability;
  }

  __device__ __forceinline__ void finish() {}

 private:
  float* line_;
  int32_t num_experts_;
};

template <class Row_>
struct StatsTraits {
  using Row = Row_;
  static constexpr bool kInRegisters = !std::is_same_v<Row, StreamedRow>;
  // One warp writes its line to the workspace itself; several meet in shared memory.
  static constexpr int kThreads = kInRegisters ? 256 : kWarpSize;
  static constexpr int kGroups = kThreads / Row::Lanes::kLanes;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) router_stats_kernel(RouterStatsParams params) {
  using Row = typename Traits::Row;
  using Lanes = typename Row::Lanes;
  MOEKERNELS_DYNAMIC_SMEM(smem);
  begin_overlapped();
  const Pieces pieces = pieces_of(params);
  const int64_t piece = blockIdx.x;
  const int64_t first = piece % pieces.per_group * pieces.tokens;
  const int64_t last = first + pieces.tokens < params.group_size ? first + pieces.tokens : params.group_size;
  const int64_t before = piece / pieces.per_group * params.group_size;  // tokens of earlier groups
  const int64_t line_floats = line_size(params);
  float* const target = static_cast<float*>(params.workspace) + piece * line_floats;
  const int group = static_cast<int>(threadIdx.x) / Lanes::kLanes;
  float* const line = Traits::kInRegisters ? reinterpret_cast<float*>(smem) + group * line_floats : target;

  LaneSums<Row> sums(line, params.num_experts);
  float z_sum = 0.0f;
#pragma unroll 1
  for (int64_t token = before + first + group; token < before + last; token += Traits::kGroups) {
    // A token whose mask is 0 has no influence, NaN or not.
    const float mask = params.mask == nullptr ? 1.0f : params.mask[token];
    if (mask == 0.0f) continue;
    const Row row(logits_of(params), token);
    const Softmax probability(row, DType::kFloat32);
    auto keys = row.keys([](int, float logit) { return key_of(logit); });
#pragma unroll 1
    for (int k = 0; k < params.top_k; ++k) keys.pick();
    row.for_each_place([&](int place, int expert, float logit) {
      const float count = keys.is_picked(place, expert, logit) ? mask : 0.0f;
      sums.add(place, expert, count, mask * probability(logit));
    });
    const float z = probability.log_sum_exp();
    z_sum += mask * z * z;
  }
  sums.finish();
  if (Lanes::lane() == 0) line[line_floats - 1] = z_sum;

  if constexpr (Traits::kInRegisters) {
    __syncthreads();
    const float* lines = reinterpret_cast<const float*>(smem);
    for (int64_t i = threadIdx.x; i < line_floats; i += Traits::kThreads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int g = 0; g < Traits::kGroups; ++g) sum += lines[g * line_floats + i];
      target[i] = sum;
    }
  }
}

constexpr int kColumns = 32;
constexpr int kRuns = 16;  // threads that share a column

// Adds the lines of a group: thread (x, y) those of pieces y, y + kRuns, ... at one column.
__global__ void __launch_bounds__(kColumns* kRuns) router_stats_sum_kernel(RouterStatsParams params) {
  __shared__ float partial[kRuns][kColumns];
  begin_overlapped();
  const int64_t pieces = pieces_of(params).per_group;
  const int64_t line_floats = line_size(params);
  const int64_t blocks_per_group = ceil_div(line_floats, kColumns);
  const int64_t group = blockIdx.x / blocks_per_group;
  const int64_t column = blockIdx.x % blocks_per_group * kColumns + threadIdx.x;
  const float* line = static_cast<const float*>(params.workspace) + group * pieces * line_floats;
  float sum = 0.0f;
  if (column < line_floats) {
#pragma unroll 8
    for (int64_t piece = threadIdx.y; piece < pieces; piece += kRuns) sum += line[piece * line_floats + column];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= line_floats) return;
#pragma unroll
  for (int y = 1; y < kRuns; ++y) sum += partial[y][threadIdx.x];
  const int64_t num_experts = params.num_experts;
  if (column < num_experts) {
    params.counts[group * num_experts + column] = sum;
  } else if (column < 2 * num_experts) {
    params.prob_sums[group * num_experts + column - num_experts] = sum;
  } else {
    params.z_sums[group] = sum;
  }
}

template <class Row>
cudaError_t launch_router_stats(const RouterStatsParams& params, cudaStream_t stream) {
  using Traits = StatsTraits<Row>;
  const int64_t blocks = params.num_groups * pieces_of(params).per_group;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t smem_bytes =
      Traits::kInRegisters ? Traits::kGroups * line_size(params) * static_cast<int64_t>(sizeof(float)) : 0;
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), static_cast<size_t>(smem_bytes),
                      stream};
  config.overlap_previous = can_overlap_previous<router_stats_kernel<Traits>>();
  return launch<router_stats_kernel<Traits>>(config, params);
}

cudaError_t launch_router_stats_sum(const RouterStatsParams& params, cudaStream_t stream) {
  const int64_t blocks = params.num_groups * ceil_div(line_size(params), kColumns);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kColumns, kRuns), 0, stream};
  config.overlap_previous = can_overlap_previous<router_stats_sum_kernel>();
  return launch<router_stats_sum_kernel>(config, params);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) router_stats_grad_kernel(RouterStatsGradParams params) {
  using Row = typename Traits::Row;
  begin_overlapped();
  const int64_t token = token_of_group<Traits>();
  if (token >= params.num_groups * params.group_size) return;
  const Row row(logits_of(params), token);
  const float mask = params.mask == nullptr ? 1.0f : params.mask[token];
  if (mask == 0.0f) {
    row.store(params.grad_logits, token, [](int, float) { return 0.0f; });
    return;
  }
  const int64_t group = token / params.group_size;
  const float* grad_probs = params.grad_prob_sums + group * params.num_experts;
  const Softmax probability(row, DType::kFloat32);
  float product = 0.0f;
  row.for_each([&](int expert, float logit) { product += grad_probs[expert] * probability(logit); });
  product = Row::Lanes::sum(product);
  const float all = 2.0f * probability.log_sum_exp() * params.grad_z_sums[group];
  row.store(params.grad_logits, token,
            [&](int expert, float logit) { return mask * probability(logit) * (grad_probs[expert] - product + all); });
}

}  // namespace

int64_t workspace_bytes(const RouterStatsParams& params) {
  return params.num_groups * pieces_of(params).per_group * line_size(params) * static_cast<int64_t>(sizeof(float));
}

cudaError_t run(const RouterStatsParams& params, cudaStream_t stream) {
  if (params.num_groups <= 0) return cudaSuccess;
  if (params.top_k > params.num_experts) return cudaErrorInvalidValue;
  const cudaError_t error = dispatch_row(
      params.num_experts, [&](auto tag) { return launch_router_stats<typename decltype(tag)::Type>(params, stream); });
  return error != cudaSuccess ? error : launch_router_stats_sum(params, stream);
}

cudaError_t run(const RouterStatsGradParams& params, cudaStream_t stream) {
  const int64_t num_tokens = params.num_groups * params.group_size;
  if (num_tokens <= 0 || params.num_experts <= 0) return cudaSuccess;
  return dispatch_row(params.num_experts, [&](auto tag) {
    using Traits = RouterTraits<typename decltype(tag)::Type>;
    return launch_tokens<Traits, router_stats_grad_kernel<Traits>>(params, num_tokens, stream);
  });
}

}  // namespace moekernels
