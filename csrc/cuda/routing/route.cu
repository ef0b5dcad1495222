// logits [T, E] -> weights [T, K], expert_ids [T, K]
//
// A group of lanes routes one token (router_rows.cuh).
//
//   keys    Every score becomes a 32-bit integer that orders as the definition orders scores (see key_of).
//   pick    The largest key of the group, then the lowest expert that has it: two reductions of 32 bits, which a warp
//           does in one instruction each. Nothing of the score is given up to make room for the index, and the key of
//           the chosen expert turns back into its score, so that nobody has to ask the lane that holds it.
//   write   Lane k of the group computes and writes choice k.
//
// The rules are those of ops/reference.py; which one is a run-time value too.
#include "cuda/routing/router_probabilities.cuh"
#include "cuda/routing/router_rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// ---- the rules ----

// Where a token's choices go: choice k through lane k % kLanes.
template <class Lanes>
class Output {
 public:
  __device__ __forceinline__ Output(const RouteParams& params, int64_t token)
      : weights_(params.weights + token * params.top_k),
        expert_ids_(params.expert_ids + token * params.top_k),
        top_k_(params.top_k) {}

  __device__ __forceinline__ void put(int k, float weight, int32_t expert_id) {
    if (Lanes::lane() != k % Lanes::kLanes) return;
    weights_[k] = weight;
    expert_ids_[k] = expert_id;
    last_ = weight;
    sum_ += weight;
  }

  // Divides all weights by their sum, or by `smallest` if that is more.
  __device__ __forceinline__ void renormalize(float smallest) {
    const float sum = Lanes::sum(sum_);
    const float divisor = sum < smallest ? smallest : sum;
#pragma unroll 1
    for (int k = Lanes::lane(); k < top_k_; k += Lanes::kLanes) {
      weights_[k] = (top_k_ <= Lanes::kLanes ? last_ : weights_[k]) / divisor;
    }
  }

  __device__ __forceinline__ void put_unrouted() {
#pragma unroll 1
    for (int k = Lanes::lane(); k < top_k_; k += Lanes::kLanes) put(k, 0.0f, -1);
  }

 private:
  float* weights_;
  int32_t* expert_ids_;
  int top_k_;
  float last_ = 0.0f;  // this lane's newest weight
  float sum_ = 0.0f;   // of this lane's weights
};

template <class Row>
__device__ __forceinline__ void softmax_top_k(const RouteParams& params, const Row& row,
                                              Output<typename Row::Lanes>& out) {
  using Lanes = typename Row::Lanes;
  const Softmax probability(row, params.probs_dtype);
  // Float32 probabilities have the order of the logits, except that their rounding can make ties.
  const bool by_logit = params.probs_dtype == DType::kFloat32;
  auto keys = row.keys([&](int, float logit) { return by_logit ? key_of(logit) : key_of(probability(logit)); });
#pragma unroll 1
  for (int first = 0; first < params.top_k; first += Lanes::kLanes) {
    const int count = params.top_k - first < Lanes::kLanes ? params.top_k - first : Lanes::kLanes;
    Choice mine{};
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const Choice choice = keys.pick();
      if (Lanes::lane() == k) mine = choice;
    }
    if (Lanes::lane() < count) {
      const float score = score_of(mine.key);
      out.put(first + Lanes::lane(), by_logit ? probability(score) : score, mine.expert_id);
    }
  }
}

template <class Row>
__device__ __forceinline__ void top2_gate(const RouteParams& params, int64_t token, const Row& row,
                                          Output<typename Row::Lanes>& out) {
  const Softmax probability(row, params.probs_dtype);
  auto by_probability = row.keys([&](int, float logit) { return key_of(probability(logit)); });
  const Choice first = by_probability.pick();
  out.put(0, score_of(first.key), first.expert_id);
  // The first expert is removed rather than given a low score, which a row of -inf would not notice.
  const float* noise = params.noise == nullptr ? nullptr : params.noise + token * params.num_experts;
  auto by_logit = row.keys([&](int expert, float logit) {
    return expert == first.expert_id ? kNoKey : key_of(noise == nullptr ? logit : logit + noise[expert]);
  });
  const int32_t second = by_logit.pick().expert_id;
  uint32_t found = kNoKey;
  row.for_each([&](int expert, float logit) {
    if (expert == second) found = key_of(probability(logit));
  });
  out.put(1, score_of(Row::Lanes::max(found)), second);
}

template <class Row>
__device__ __forceinline__ void sparsemixer(const RouteParams& params, int64_t token, const Row& row,
                                            Output<typename Row::Lanes>& out) {
  const DType dtype = params.logits_dtype;
  int32_t removed = -1;
#pragma unroll 1
  for (int k = 0; k < 2; ++k) {
    const Choice largest =
        pick_largest(row, [&](int expert, float logit) { return key_of(NearTies::candidate(removed, expert, logit)); });
    const NearTies ties(row, removed, score_of(largest.key), params.eps, dtype);
    int32_t chosen = largest.expert_id;
    float score = ties.maximum;
    if (params.noise != nullptr) {
      const float* noise = params.noise + (k * params.num_tokens + token) * params.num_experts;
      const Choice drawn = pick_largest(row, [&](int expert, float logit) {
        return key_of(round_to(dtype, ties.masked(expert, logit) + noise[expert]));
      });
      chosen = drawn.expert_id;
      uint32_t found = kNoKey;
      row.for_each([&](int expert, float logit) {
        if (expert == chosen) found = key_of(ties.masked(expert, logit));
      });
      score = score_of(Row::Lanes::max(found));
    }
    out.put(k, round_to(dtype, ties.probability(score)), chosen);
    removed = chosen;
  }
}

// ---- kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 4) route_kernel(RouteParams params) {
  using Row = typename Traits::Row;
  begin_overlapped();
  const int64_t token = token_of_group<Traits>();
  if (token >= params.num_tokens) return;
  Output<typename Row::Lanes> out(params, token);
  if (params.mask != nullptr && params.mask[token] == 0) {
    out.put_unrouted();
    return;
  }
  const Row row(logits_of(params), token);
  switch (params.scoring) {
    case Scoring::kSoftmax:
      softmax_top_k(params, row, out);
      break;
    case Scoring::kTop2Gate:
      top2_gate(params, token, row, out);
      break;
    case Scoring::kSparsemixer:
      sparsemixer(params, token, row, out);
      break;
  }
  if (params.renormalize) {
    out.renormalize(params.scoring == Scoring::kTop2Gate ? epsilon_of(params.probs_dtype) : 0.0f);
  }
}

}  // namespace

cudaError_t run(const RouteParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 0 || params.num_experts <= 0 || params.top_k <= 0) return cudaSuccess;
  if (params.top_k > params.num_experts) return cudaErrorInvalidValue;
  if (params.scoring != Scoring::kSoftmax && params.top_k != 2) return cudaErrorInvalidValue;
  return dispatch_row(params.num_experts, [&](auto tag) {
    using Traits = RouterTraits<typename decltype(tag)::Type>;
    return launch_tokens<Traits, route_kernel<Traits>>(params, params.num_tokens, stream);
  });
}

}  // namespace moekernels
