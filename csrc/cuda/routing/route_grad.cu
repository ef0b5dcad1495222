// logits [T, E], expert_ids [T, K], grad_weights [T, K] -> grad_logits [T, E]
//
// The weights are w[k] = r[k] / s, or r[k] alone, with r[k] = round(p_k[chosen]) and p_k a softmax: of all logits, or
// (kSparsemixer) of the near-ties of choice k. Rounding passes gradients on unchanged. With g[k] the gradient of r[k],
//   grad_logits[e] = sum over k of p_k[e] * ([e is choice k] * g[k] - p_k[chosen] * g[k])
//
// A group of lanes works on one token (router_rows.cuh). Lane k of it looks after choice k, reading that one logit
// again; what all experts need of the choices is a few sums. An expert then asks each choice whether it is the one:
// the ids and gradients of a token are a cache line that every lane reads at once.
#include "cuda/routing/router_probabilities.cuh"
#include "cuda/routing/router_rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

// A token's choices and how their gradients pass through the renormalization.
class ChoiceGrads {
 public:
  __device__ __forceinline__ ChoiceGrads(const RouteGradParams& params, int64_t token)
      : expert_ids_(params.expert_ids + token * params.top_k),
        grad_weights_(params.grad_weights + token * params.top_k),
        top_k_(params.top_k),
        num_experts_(params.num_experts) {}

  __device__ __forceinline__ int top_k() const { return top_k_; }
  __device__ __forceinline__ int32_t expert(int k) const { return expert_ids_[k]; }
  __device__ __forceinline__ bool is_chosen(int k) const {
    return expert_ids_[k] >= 0 && expert_ids_[k] < num_experts_;
  }

  // The gradient of r[k], for a choice that is one.
  __device__ __forceinline__ float operator()(int k) const { return (grad_weights_[k] - shift_) * scale_; }

  // The gradient of all r that are `expert` among choices [begin, end).
  __device__ __forceinline__ float of_expert(int expert, int begin, int end) const {
    float grad = 0.0f;
#pragma unroll 1
    for (int k = begin; k < end; ++k) {
      if (expert_ids_[k] == expert) grad += (*this)(k);
    }
    return grad;
  }

  // Weights are divided by the sum of r, or by `smallest` where that is more. `weight_at(k)` is r[k]; all lanes call.
  template <class Lanes, class WeightAt>
  __device__ __forceinline__ void renormalize(float smallest, WeightAt weight_at) {
    float sum = 0.0f;
    float product = 0.0f;
#pragma unroll 1
    for (int k = Lanes::lane(); k < top_k_; k += Lanes::kLanes) {
      if (!is_chosen(k)) continue;
      const float weight = weight_at(k);
      sum += weight;
      product += weight * grad_weights_[k];
    }
    sum = Lanes::sum(sum);
    product = Lanes::sum(product);
    shift_ = sum < smallest ? 0.0f : product / sum;
    scale_ = 1.0f / (sum < smallest ? smallest : sum);
  }

 private:
  const int32_t* expert_ids_;
  const float* grad_weights_;
  int top_k_;
  int32_t num_experts_;
  float shift_ = 0.0f;
  float scale_ = 1.0f;
};

template <class T>
__device__ __forceinline__ float logit_as(const void* data, int64_t i) {
  return to_float(static_cast<const T*>(data)[i]);
}

__device__ __forceinline__ float logit_at(const RouteGradParams& params, int64_t token, int32_t expert) {
  const int64_t i = token * params.logits_stride + expert;
  switch (params.logits_dtype) {
    case DType::kBFloat16:
      return logit_as<__nv_bfloat16>(params.logits, i);
    case DType::kFloat16:
      return logit_as<__half>(params.logits, i);
    case DType::kFloat32:
      break;
  }
  return logit_as<float>(params.logits, i);
}

template <class Row>
__device__ __forceinline__ void softmax_grad(const RouteGradParams& params, int64_t token, const Row& row,
                                             ChoiceGrads& grads) {
  using Lanes = typename Row::Lanes;
  const Softmax probability(row, DType::kFloat32);
  const auto chosen_probability = [&](int k) { return probability(logit_at(params, token, grads.expert(k))); };
  if (params.renormalize) {
    const float smallest = params.scoring == Scoring::kTop2Gate ? epsilon_of(params.probs_dtype) : 0.0f;
    grads.template renormalize<Lanes>(smallest,
                                      [&](int k) { return round_to(params.probs_dtype, chosen_probability(k)); });
  }
  float product = 0.0f;
#pragma unroll 1
  for (int k = Lanes::lane(); k < grads.top_k(); k += Lanes::kLanes) {
    if (grads.is_chosen(k)) product += chosen_probability(k) * grads(k);
  }
  product = Lanes::sum(product);
  row.store(params.grad_logits, token, [&](int expert, float logit) {
    return probability(logit) * (grads.of_expert(expert, 0, grads.top_k()) - product);
  });
}

template <class Row>
__device__ __forceinline__ NearTies near_ties(const RouteGradParams& params, const Row& row, int32_t removed) {
  const Choice largest =
      pick_largest(row, [&](int expert, float logit) { return key_of(NearTies::candidate(removed, expert, logit)); });
  return NearTies(row, removed, score_of(largest.key), params.eps, params.logits_dtype);
}

template <class Row>
__device__ __forceinline__ void sparsemixer_grad(const RouteGradParams& params, int64_t token, const Row& row,
                                                 ChoiceGrads& grads) {
  const NearTies first = near_ties(params, row, -1);
  const NearTies second = near_ties(params, row, grads.is_chosen(0) ? grads.expert(0) : -1);
  const auto probability = [&](int k, int expert, float logit) {
    return k == 0 ? first.probability(first.masked(expert, logit)) : second.probability(second.masked(expert, logit));
  };
  const auto chosen_probability = [&](int k) {
    return probability(k, grads.expert(k), logit_at(params, token, grads.expert(k)));
  };
  if (params.renormalize) {
    grads.template renormalize<typename Row::Lanes>(
        0.0f, [&](int k) { return round_to(params.logits_dtype, chosen_probability(k)); });
  }
  float products[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) products[k] = grads.is_chosen(k) ? chosen_probability(k) * grads(k) : 0.0f;
  row.store(params.grad_logits, token, [&](int expert, float logit) {
    float grad = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      grad += probability(k, expert, logit) * (grads.of_expert(expert, k, k + 1) - products[k]);
    }
    return grad;
  });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 4) route_grad_kernel(RouteGradParams params) {
  using Row = typename Traits::Row;
  begin_overlapped();
  const int64_t token = token_of_group<Traits>();
  if (token >= params.num_tokens) return;
  ChoiceGrads grads(params, token);
  const Row row(logits_of(params), token);
  bool any = false;
  for (int k = 0; k < params.top_k; ++k) any = any || grads.is_chosen(k);
  if (!any) {
    row.store(params.grad_logits, token, [](int, float) { return 0.0f; });
  } else if (params.scoring == Scoring::kSparsemixer) {
    sparsemixer_grad(params, token, row, grads);
  } else {
    softmax_grad(params, token, row, grads);
  }
}

}  // namespace

cudaError_t run(const RouteGradParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 0 || params.num_experts <= 0) return cudaSuccess;
  if (params.scoring != Scoring::kSoftmax && params.top_k != 2) return cudaErrorInvalidValue;
  return dispatch_row(params.num_experts, [&](auto tag) {
    using Traits = RouterTraits<typename decltype(tag)::Type>;
    return launch_tokens<Traits, route_grad_kernel<Traits>>(params, params.num_tokens, stream);
  });
}

}  // namespace moekernels
