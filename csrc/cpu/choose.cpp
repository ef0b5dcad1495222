// scores [T, E] -> weights [T, K], expert_ids [T, K]
//
// NaN, ties and signed zeros are ordered as route.cpp orders them.
#include <limits>
#include <vector>

#include "common/rounding.h"
#include "cpu/largest.h"
#include "cpu/parallel.h"
#include "cpu/scoring.h"

namespace moekernels {
namespace {

constexpr float kLeastSum = 1e-20f;  // that weights are divided by, as in the code of DeepSeek-V3

class Chooser {
 public:
  explicit Chooser(const ChooseParams& params)
      : p_(params),
        group_size_(params.num_experts / params.num_groups),
        choice_(static_cast<size_t>(params.num_experts)),
        groups_(static_cast<size_t>(params.num_groups)),
        kept_(static_cast<size_t>(params.top_groups)),
        largest_(largest_count(params)) {}

  void choose(int64_t token) {
    float* weights = p_.weights + token * p_.top_k;
    int32_t* expert_ids = p_.expert_ids + token * p_.top_k;
    if (cpu::leave_out(p_.mask, token, p_.top_k, weights, expert_ids)) return;
    const float* scores = p_.scores + token * p_.scores_stride;
    const float* choice = scores;
    if (p_.bias != nullptr || p_.top_groups < p_.num_groups) {
      for (int32_t e = 0; e < p_.num_experts; ++e) choice_[e] = p_.bias == nullptr ? scores[e] : scores[e] + p_.bias[e];
      choice = choice_.data();
    }
    if (p_.top_groups < p_.num_groups) leave_out_groups();
    largest_.find(choice, p_.num_experts, p_.top_k, expert_ids);
    float sum = 0.0f;
    for (int32_t k = 0; k < p_.top_k; ++k) sum += weights[k] = scores[expert_ids[k]];
    const float divisor = sum + kLeastSum;
    for (int32_t k = 0; k < p_.top_k; ++k) {
      if (p_.renormalize) weights[k] /= divisor;
      weights[k] *= p_.scale;
    }
  }

 private:
  static int32_t largest_count(const ChooseParams& p) {
    const int32_t most = p.top_k > p.top_groups ? p.top_k : p.top_groups;
    return most > 2 ? most : 2;
  }

  // Sets the choice of experts in other groups to -inf.
  void leave_out_groups() {
    for (int32_t g = 0; g < p_.num_groups; ++g) {
      const float* group = choice_.data() + g * group_size_;
      int32_t best[2] = {0, 0};
      largest_.find(group, group_size_, group_size_ > 1 ? 2 : 1, best);
      groups_[g] = group_size_ > 1 ? group[best[0]] + group[best[1]] : group[best[0]];
    }
    largest_.find(groups_.data(), p_.num_groups, p_.top_groups, kept_.data());
    for (int32_t g = 0; g < p_.num_groups; ++g) groups_[g] = 0.0f;
    for (const int32_t g : kept_) groups_[g] = 1.0f;
    for (int32_t e = 0; e < p_.num_experts; ++e) {
      if (groups_[e / group_size_] == 0.0f) choice_[e] = -std::numeric_limits<float>::infinity();
    }
  }

  const ChooseParams& p_;
  const int32_t group_size_;
  std::vector<float> choice_;  // [E]
  std::vector<float> groups_;  // [groups]: of each the sum, then whether it is kept
  std::vector<int32_t> kept_;
  cpu::Largest largest_;
};

}  // namespace

void run(const ChooseParams& params, const Parallel& parallel) {
  constexpr int64_t kScoresPerPiece = 8 * 1024;
  cpu::for_ranges(parallel, params.num_tokens, ceil_div(kScoresPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    Chooser chooser(params);
                    for (int64_t token = begin; token < end; ++token) chooser.choose(token);
                  });
}

}  // namespace moekernels
