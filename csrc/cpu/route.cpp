// logits [T, E] -> weights [T, K], expert_ids [T, K]
//
// The rules are those of ops/reference.py. Arithmetic on a row goes through the kernel table; choosing does not, so
// that every instruction set orders NaN, ties and signed zeros alike.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace moekernels {
namespace {

// Orders floats as integers: NaN above everything, -0 equal to +0.
uint32_t sortable(float x) {
  if (std::isnan(x)) return 0xffffffffu;
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// Larger for larger scores, and for lower indices among equal ones.
uint64_t key_of(float score, int32_t index) {
  return static_cast<uint64_t>(sortable(score)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

int32_t index_of(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// The unit in the last place of 1.
float epsilon_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 0x1p-23f;
    case DType::kBFloat16:
      return 0x1p-7f;
    case DType::kFloat16:
      return 0x1p-10f;
  }
  return 0.0f;
}

class Router {
 public:
  explicit Router(const RouteParams& params)
      : p_(params),
        table_(cpu::kernels()),
        logits_(static_cast<size_t>(params.num_experts)),
        probs_(static_cast<size_t>(params.num_experts)),
        candidates_(static_cast<size_t>(params.num_experts)),
        noisy_(static_cast<size_t>(params.num_experts)),
        best_(static_cast<size_t>(params.top_k)) {}

  void route(int64_t token) {
    float* weights = p_.weights + token * p_.top_k;
    int32_t* expert_ids = p_.expert_ids + token * p_.top_k;
    if (p_.mask != nullptr && p_.mask[token] == 0) {
      for (int32_t k = 0; k < p_.top_k; ++k) {
        weights[k] = 0.0f;
        expert_ids[k] = -1;
      }
      return;
    }
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
  // Leaves the indices of the k largest scores in expert_ids, the largest first.
  void largest(const std::vector<float>& scores, int32_t k, int32_t* expert_ids) {
    int32_t found = 0;
    float smallest = 0.0f;  // of the k found so far
    for (int32_t e = 0; e < p_.num_experts; ++e) {
      if (found == k && scores[e] <= smallest) continue;  // the common case; never taken for a NaN
      const uint64_t key = key_of(scores[e], e);
      if (found == k && key < best_[k - 1]) continue;
      int32_t place = found < k ? found++ : k - 1;
      for (; place > 0 && best_[place - 1] < key; --place) best_[place] = best_[place - 1];
      best_[place] = key;
      if (found == k) smallest = scores[index_of(best_[k - 1])];
    }
    for (int32_t i = 0; i < found; ++i) expert_ids[i] = index_of(best_[i]);
  }

  int32_t largest(const std::vector<float>& scores) {
    int32_t expert_id = 0;
    largest(scores, 1, &expert_id);
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
    largest(p_.probs_dtype == DType::kFloat32 ? logits_ : probs_, p_.top_k, expert_ids);
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
    largest(logits_, 2, order);
    expert_ids[1] = order[0] == expert_ids[0] ? order[1] : order[0];
    for (int32_t k = 0; k < 2; ++k) weights[k] = probs_[expert_ids[k]];
  }

  // Each operation is rounded to the dtype of the logits, as PyTorch rounds it.
  void sparsemixer(int64_t token, float* weights, int32_t* expert_ids) {
    float threshold = 2.0f * p_.epsilon;
    table_.round(p_.logits_dtype, &threshold, 1);
    candidates_ = logits_;
    for (int32_t k = 0; k < 2; ++k) {
      int32_t chosen = largest(candidates_);
      keep_near_ties(candidates_[chosen], threshold);
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

  // Leaves the candidates in probs_, with -inf for those that are far from their maximum.
  void keep_near_ties(float maximum, float threshold) {
    std::vector<float>& distance = probs_;
    for (int32_t e = 0; e < p_.num_experts; ++e) distance[e] = maximum - logits_[e];
    table_.round(p_.logits_dtype, distance.data(), p_.num_experts);
    for (int32_t e = 0; e < p_.num_experts; ++e) {
      const float size = std::fabs(logits_[e]);
      distance[e] /= size < maximum || std::isnan(maximum) ? maximum : size;
    }
    table_.round(p_.logits_dtype, distance.data(), p_.num_experts);
    for (int32_t e = 0; e < p_.num_experts; ++e) {
      probs_[e] = distance[e] > threshold ? -std::numeric_limits<float>::infinity() : candidates_[e];
    }
  }

  void renormalize(float* weights) const {
    const float smallest = p_.scoring == Scoring::kTop2Gate ? epsilon_of(p_.probs_dtype) : 0.0f;
    float sum = 0.0f;
    for (int32_t k = 0; k < p_.top_k; ++k) sum += weights[k];
    const float divisor = sum < smallest ? smallest : sum;
    for (int32_t k = 0; k < p_.top_k; ++k) weights[k] /= divisor;
  }

  const RouteParams& p_;
  const cpu::KernelTable& table_;
  std::vector<float> logits_, probs_, candidates_, noisy_;  // [E]
  std::vector<uint64_t> best_;                              // [K]
};

}  // namespace

void route_cpu(const RouteParams& params, const Parallel& parallel) {
  constexpr int64_t kLogitsPerPiece = 8 * 1024;
  if (params.num_experts <= 0 || params.top_k <= 0) return;
  cpu::for_ranges(parallel, params.num_tokens, cpu::ceil_div(kLogitsPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    Router router(params);
                    for (int64_t token = begin; token < end; ++token) router.route(token);
                  });
}

}  // namespace moekernels
