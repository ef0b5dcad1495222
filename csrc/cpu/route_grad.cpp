// logits [T, E], expert_ids [T, K], grad_weights [T, K] -> grad_logits [T, E]
//
// The weights are w[k] = r[k] / s, or r[k] alone, with r[k] = round(p_k[chosen]) a softmax p_k of the logits: of all of
// them, or (kSparsemixer) of the near-ties of the k-th choice. Rounding passes gradients on unchanged.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/largest.h"
#include "cpu/parallel.h"
#include "cpu/scoring.h"

namespace moekernels {
namespace {

class RouterGrad {
 public:
  explicit RouterGrad(const RouteGradParams& params)
      : p_(params),
        table_(cpu::kernels()),
        logits_(static_cast<size_t>(params.num_experts)),
        candidates_(static_cast<size_t>(params.num_experts)),
        probs_(static_cast<size_t>(params.num_experts * (params.scoring == Scoring::kSparsemixer ? 2 : 1))),
        grad_(static_cast<size_t>(params.num_experts)),
        weights_(static_cast<size_t>(params.top_k)),
        grad_weights_(static_cast<size_t>(params.top_k)),
        largest_(1) {}

  void token(int64_t token) {
    expert_ids_ = p_.expert_ids + token * p_.top_k;
    std::fill(grad_.begin(), grad_.end(), 0.0f);
    if (std::any_of(expert_ids_, expert_ids_ + p_.top_k, [this](int32_t e) { return is_expert(e); })) {
      const int64_t first = token * p_.logits_stride * size_of(p_.logits_dtype);
      table_.widen(p_.logits_dtype, static_cast<const char*>(p_.logits) + first, logits_.data(), p_.num_experts);
      p_.scoring == Scoring::kSparsemixer ? near_tie_probs() : softmax_probs();
      through_renormalization(p_.grad_weights + token * p_.top_k);
      through_softmax();
    }
    void* target = static_cast<char*>(p_.grad_logits) + token * p_.num_experts * size_of(p_.logits_dtype);
    table_.narrow(p_.logits_dtype, grad_.data(), target, p_.num_experts);
  }

 private:
  bool is_expert(int32_t id) const { return id >= 0 && id < p_.num_experts; }

  // The probabilities that the k-th weight is taken from.
  const float* probs(int32_t k) const {
    return probs_.data() + (p_.scoring == Scoring::kSparsemixer ? k * static_cast<int64_t>(p_.num_experts) : 0);
  }

  void softmax_probs() { table_.softmax(logits_.data(), probs_.data(), p_.num_experts); }

  void near_tie_probs() {
    candidates_ = logits_;
    for (int32_t k = 0; k < 2; ++k) {
      int32_t best = 0;
      largest_.find(candidates_.data(), p_.num_experts, 1, &best);
      float* target = probs_.data() + k * static_cast<int64_t>(p_.num_experts);
      cpu::keep_near_ties(table_, p_.logits_dtype, p_.eps, logits_.data(), candidates_.data(), candidates_[best],
                          target, p_.num_experts);
      table_.softmax(target, target, p_.num_experts);
      if (is_expert(expert_ids_[k])) candidates_[expert_ids_[k]] = -std::numeric_limits<float>::infinity();
    }
  }

  // Leaves the gradients of the rounded probabilities r in grad_weights_.
  void through_renormalization(const float* grad_weights) {
    for (int32_t k = 0; k < p_.top_k; ++k) {
      const bool chosen = is_expert(expert_ids_[k]);
      weights_[k] = chosen ? probs(k)[expert_ids_[k]] : 0.0f;
      grad_weights_[k] = chosen ? grad_weights[k] : 0.0f;
    }
    if (!p_.renormalize) return;
    table_.round(p_.scoring == Scoring::kSparsemixer ? p_.logits_dtype : p_.probs_dtype, weights_.data(), p_.top_k);
    float sum = 0.0f, product = 0.0f;
    for (int32_t k = 0; k < p_.top_k; ++k) {
      sum += weights_[k];
      product += weights_[k] * grad_weights_[k];
    }
    const float smallest = cpu::smallest_sum(p_.scoring, p_.probs_dtype);
    const bool clamped = sum < smallest;
    for (int32_t k = 0; k < p_.top_k; ++k) {
      grad_weights_[k] = clamped ? grad_weights_[k] / smallest : (grad_weights_[k] - product / sum) / sum;
    }
  }

  // grad[e] = sum over k of p_k[chosen] * grad_weights[k] * ([e is chosen] - p_k[e]), one softmax at a time
  void through_softmax() {
    const int32_t choices = p_.scoring == Scoring::kSparsemixer ? 1 : p_.top_k;  // that share a softmax
    for (int32_t k = 0; k < p_.top_k; k += choices) {
      const float* probs = this->probs(k);
      float product = 0.0f;
      for (int32_t j = k; j < k + choices; ++j) {
        if (is_expert(expert_ids_[j])) product += probs[expert_ids_[j]] * grad_weights_[j];
      }
      for (int32_t e = 0; e < p_.num_experts; ++e) grad_[e] -= probs[e] * product;
      for (int32_t j = k; j < k + choices; ++j) {
        if (is_expert(expert_ids_[j])) grad_[expert_ids_[j]] += probs[expert_ids_[j]] * grad_weights_[j];
      }
    }
  }

  const RouteGradParams& p_;
  const cpu::KernelTable& table_;
  std::vector<float> logits_, candidates_;     // [E]
  std::vector<float> probs_;                   // [E], or [2, E]
  std::vector<float> grad_;                    // [E]
  std::vector<float> weights_, grad_weights_;  // [K]
  cpu::Largest largest_;
  const int32_t* expert_ids_ = nullptr;  // of the token
};

}  // namespace

void run(const RouteGradParams& params, const Parallel& parallel) {
  constexpr int64_t kLogitsPerPiece = 8 * 1024;
  if (params.num_experts <= 0 || params.top_k <= 0) return;
  cpu::for_ranges(parallel, params.num_tokens, ceil_div(kLogitsPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    RouterGrad grad(params);
                    for (int64_t token = begin; token < end; ++token) grad.token(token);
                  });
}

}  // namespace moekernels
