// logits [T, E] -> weights [T, K], expert_ids [T, K]
//
// The rules are those of ops/reference.py. What is done to a row goes through the kernel table; every instruction set
// orders NaN, ties and signed zeros alike.
#include <limits>
#include <vector>

#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/largest.h"
#include "cpu/parallel.h"
#include "cpu/scoring.h"

namespace moekernels {
namespace {

class Router {
 public:
  explicit Router(const RouteParams& params)
      : p_(params),
        table_(cpu::kernels()),
        logits_(static_cast<size_t>(params.num_experts)),
        probs_(static_cast<size_t>(params.num_experts)),
        candidates_(static_cast<size_t>(params.num_experts)),
        noisy_(static_cast<size_t>(params.num_experts)),
        largest_(params.top_k > 1 ? params.top_k : 2) {}

  void route(int64_t token) {
    float* weights = p_.weights + token * p_.top_k;
    int32_t* expert_ids = p_.expert_ids + token * p_.top_k;
    if (cpu::leave_out(p_.mask, token, p_.top_k, weights, expert_ids)) return;
    const int64_t first = token * p_.logits_stride * size_of(p_.logits_dtype);
    table_.widen(p_.logits_dtype, static_cast<const char*>(p_.logits) + first, logits_.data(), p_.num_experts);
    switch (p_.scoring) {
      case Scoring::kSoftmax:
        softmax_top_k(weights, expert_ids);
        break;
      case Scoring::kTop2Gate:
        top2_gate(token, weights, expert_ids);
        break;
      case Scoring::kSparsemixer:
        sparsemixer(token, weights, expert_ids);
        break;
    }
    if (p_.renormalize) renormalize(weights);
  }

 private:
  int32_t largest(const std::vector<float>& scores) {
    int32_t expert_id = 0;
    largest_.find(scores.data(), p_.num_experts, 1, &expert_id);
    return expert_id;
  }

  // Rounded to probs_dtype.
  void softmax() {
    table_.softmax(logits_.data(), probs_.data(), p_.num_experts);
    table_.round(p_.probs_dtype, probs_.data(), p_.num_experts);
  }

  void softmax_top_k(float* weights, int32_t* expert_ids) {
    softmax();
    // Float32 probabilities have the order of the logits, except that their rounding can make ties.
    const std::vector<float>& scores = p_.probs_dtype == DType::kFloat32 ? logits_ : probs_;
    largest_.find(scores.data(), p_.num_experts, p_.top_k, expert_ids);
    for (int32_t k = 0; k < p_.top_k; ++k) weights[k] = probs_[expert_ids[k]];
  }

  void top2_gate(int64_t token, float* weights, int32_t* expert_ids) {
    softmax();
    expert_ids[0] = largest(probs_);
    if (p_.noise != nullptr) {
      const float* noise = p_.noise + token * p_.num_experts;
      for (int32_t e = 0; e < p_.num_experts; ++e) logits_[e] += noise[e];
    }
    // The best other one. Lowering the first expert's score instead would not show in a row of -inf.
    int32_t order[2] = {0, 0};
    largest_.find(logits_.data(), p_.num_experts, 2, order);
    expert_ids[1] = order[0] == expert_ids[0] ? order[1] : order[0];
    for (int32_t k = 0; k < 2; ++k) weights[k] = probs_[expert_ids[k]];
  }

  void sparsemixer(int64_t token, float* weights, int32_t* expert_ids) {
    candidates_ = logits_;
    for (int32_t k = 0; k < 2; ++k) {
      int32_t chosen = largest(candidates_);
      cpu::keep_near_ties(table_, p_.logits_dtype, p_.eps, logits_.data(), candidates_.data(), candidates_[chosen],
                          probs_.data(), p_.num_experts);
      if (p_.noise != nullptr) {
        const float* noise = p_.noise + (k * p_.num_tokens + token) * p_.num_experts;
        for (int32_t e = 0; e < p_.num_experts; ++e) noisy_[e] = probs_[e] + noise[e];
        table_.round(p_.logits_dtype, noisy_.data(), p_.num_experts);
        chosen = largest(noisy_);
      }
      table_.softmax(probs_.data(), probs_.data(), p_.num_experts);
      table_.round(p_.logits_dtype, probs_.data(), p_.num_experts);
      weights[k] = probs_[chosen];
      expert_ids[k] = chosen;
      candidates_[chosen] = -std::numeric_limits<float>::infinity();
    }
  }

  void renormalize(float* weights) const {
    const float smallest = cpu::smallest_sum(p_.scoring, p_.probs_dtype);
    float sum = 0.0f;
    for (int32_t k = 0; k < p_.top_k; ++k) sum += weights[k];
    const float divisor = sum < smallest ? smallest : sum;
    for (int32_t k = 0; k < p_.top_k; ++k) weights[k] /= divisor;
  }

  const RouteParams& p_;
  const cpu::KernelTable& table_;
  std::vector<float> logits_, probs_, candidates_, noisy_;  // [E]
  cpu::Largest largest_;
};

}  // namespace

void run(const RouteParams& params, const Parallel& parallel) {
  constexpr int64_t kLogitsPerPiece = 8 * 1024;
  if (params.num_experts <= 0 || params.top_k <= 0) return;
  cpu::for_ranges(parallel, params.num_tokens, ceil_div(kLogitsPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    Router router(params);
                    for (int64_t token = begin; token < end; ++token) router.route(token);
                  });
}

}  // namespace moekernels
