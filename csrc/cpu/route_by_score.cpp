// logits [T, E] -> weights [T, K], expert_ids [T, K]
//
// NaN, ties and signed zeros are ordered as route.cpp orders them.
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

constexpr float kLeastSum = 1e-20f;  // that weights are divided by, as in the code of DeepSeek-V3

class ScoreRouter {
 public:
  explicit ScoreRouter(const RouteByScoreParams& params)
      : p_(params),
        table_(cpu::kernels()),
        group_size_(params.num_experts / params.num_groups),
        in_groups_(params.top_groups < params.num_groups),
        logits_(static_cast<size_t>(params.num_experts)),
        scores_(static_cast<size_t>(params.num_experts)),
        choice_(static_cast<size_t>(params.bias != nullptr || in_groups_ ? params.num_experts : 0)),
        in_kept_(static_cast<size_t>(in_groups_ ? params.top_groups * group_size_ : 0)),
        groups_(static_cast<size_t>(params.num_groups)),
        kept_(static_cast<size_t>(params.top_groups)),
        largest_(std::max({params.top_k, params.top_groups, 2})) {}

  void route(int64_t token) {
    float* weights = p_.weights + token * p_.top_k;
    int32_t* expert_ids = p_.expert_ids + token * p_.top_k;
    if (cpu::leave_out(p_.mask, token, p_.top_k, weights, expert_ids)) return;
    const int64_t first = token * p_.logits_stride * size_of(p_.logits_dtype);
    table_.widen(p_.logits_dtype, static_cast<const char*>(p_.logits) + first, logits_.data(), p_.num_experts);
    float* const choice = choice_.empty() ? nullptr : choice_.data();
    table_.score(p_.score, logits_.data(), p_.bias, scores_.data(), choice, p_.num_experts);
    if (!in_groups_ || !choose_in_groups(expert_ids)) {
      largest_.find(choice == nullptr ? scores_.data() : choice, p_.num_experts, p_.top_k, expert_ids);
    }
    float sum = 0.0f;
    for (int32_t k = 0; k < p_.top_k; ++k) sum += weights[k] = scores_[expert_ids[k]];
    const float divisor = sum + kLeastSum;
    for (int32_t k = 0; k < p_.top_k; ++k) {
      if (p_.renormalize) weights[k] /= divisor;
      weights[k] *= p_.scale;
    }
  }

 private:
  // Among the experts of the groups that stay. Where one of the chosen is at -inf, as all others count, the choice of
  // others becomes that, nothing is chosen and the result is false.
  bool choose_in_groups(int32_t* expert_ids) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    if (!table_.group_sums(choice_.data(), p_.num_groups, group_size_, groups_.data())) add_up_groups();
    largest_.find(groups_.data(), p_.num_groups, p_.top_groups, kept_.data());
    std::sort(kept_.begin(), kept_.end());
    for (int32_t i = 0; i < p_.top_groups; ++i) {
      std::copy_n(choice_.data() + kept_[i] * group_size_, group_size_, in_kept_.data() + i * group_size_);
    }
    largest_.find(in_kept_.data(), p_.top_groups * group_size_, p_.top_k, expert_ids);
    if (in_kept_[expert_ids[p_.top_k - 1]] == kLowest) {
      std::fill(choice_.begin(), choice_.end(), kLowest);
      for (int32_t i = 0; i < p_.top_groups; ++i) {
        std::copy_n(in_kept_.data() + i * group_size_, group_size_, choice_.data() + kept_[i] * group_size_);
      }
      return false;
    }
    for (int32_t k = 0; k < p_.top_k; ++k) {
      expert_ids[k] = kept_[expert_ids[k] / group_size_] * group_size_ + expert_ids[k] % group_size_;
    }
    return true;
  }

  // As the kernel does, where there is a NaN, which is the largest.
  void add_up_groups() {
    for (int32_t g = 0; g < p_.num_groups; ++g) {
      const float* group = choice_.data() + g * group_size_;
      int32_t best[2] = {0, 0};
      largest_.find(group, group_size_, group_size_ > 1 ? 2 : 1, best);
      groups_[g] = group_size_ > 1 ? group[best[0]] + group[best[1]] : group[best[0]];
    }
  }

  const RouteByScoreParams& p_;
  const cpu::KernelTable& table_;
  const int32_t group_size_;
  const bool in_groups_;
  std::vector<float> logits_, scores_;  // [E]
  std::vector<float> choice_;           // [E], or nothing where it is the scores
  std::vector<float> in_kept_;          // the choice in groups that stay
  std::vector<float> groups_;           // [groups]: sums
  std::vector<int32_t> kept_;           // groups, in their order
  cpu::Largest largest_;
};

}  // namespace

void run(const RouteByScoreParams& params, const Parallel& parallel) {
  constexpr int64_t kLogitsPerPiece = 8 * 1024;
  cpu::for_ranges(parallel, params.num_tokens, ceil_div(kLogitsPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    ScoreRouter router(params);
                    for (int64_t token = begin; token < end; ++token) router.route(token);
                  });
}

}  // namespace moekernels
