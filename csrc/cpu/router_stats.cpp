// logits [G * S, E], mask [G * S] -> counts [G, E], prob_sums [G, E], z_sums [G], and backwards
//
// A group is cut into pieces of a fixed number of tokens. Each piece has its own sums in scratch memory, and these are
// added up in order: no sum depends on who computed which piece.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/rounding.h"
#include "cpu/kernel_table.h"
#include "cpu/largest.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

constexpr int64_t kTokensPerPiece = 64;

// One row of logits as float32, with its softmax.
class RouterRow {
 public:
  explicit RouterRow(int32_t num_experts)
      : table_(cpu::kernels()), logits_(static_cast<size_t>(num_experts)), probs_(static_cast<size_t>(num_experts)) {}

  void load(const void* logits, DType dtype) {
    const auto num_experts = static_cast<int64_t>(logits_.size());
    table_.widen(dtype, logits, logits_.data(), num_experts);
    table_.softmax(logits_.data(), probs_.data(), num_experts);
  }

  const float* logits() const { return logits_.data(); }
  const float* probs() const { return probs_.data(); }

  // log(sum(exp(logits))), from the largest logit and its probability.
  float log_sum_exp() const {
    const auto largest = std::max_element(logits_.begin(), logits_.end()) - logits_.begin();
    // Infinity has no probability, but is the sum all the same; NaN would be everything.
    const bool infinite = std::isinf(logits_[largest]);
    if (infinite && std::none_of(logits_.begin(), logits_.end(), [](float logit) { return std::isnan(logit); })) {
      return logits_[largest];
    }
    return logits_[largest] - std::log(probs_[largest]);
  }

 private:
  const cpu::KernelTable& table_;
  std::vector<float> logits_, probs_;  // [E]
};

// The sums of a group, or of a piece of one, in one block of floats: counts [E], prob_sums [E], z_sum.
int64_t sums_size(const RouterStatsParams& p) {
  return 2 * static_cast<int64_t>(p.num_experts) + 1;
}

int64_t pieces_per_group(const RouterStatsParams& p) {
  return ceil_div(p.group_size, kTokensPerPiece);
}

class RouterStats {
 public:
  // `sums`: of all pieces.
  RouterStats(const RouterStatsParams& params, float* sums)
      : p_(params),
        sums_(sums),
        row_(params.num_experts),
        largest_(params.top_k),
        chosen_(static_cast<size_t>(params.top_k)) {}

  void piece(int64_t piece) {
    const int64_t pieces = pieces_per_group(p_);
    const int64_t group = piece / pieces;
    const int64_t begin = piece % pieces * kTokensPerPiece;
    const int64_t end = std::min(begin + kTokensPerPiece, p_.group_size);
    float* sums = sums_ + piece * sums_size(p_);
    std::fill_n(sums, sums_size(p_), 0.0f);
    for (int64_t token = begin; token < end; ++token) add(group * p_.group_size + token, sums);
  }

 private:
  // A token whose mask is 0 has no influence, NaN or not.
  void add(int64_t token, float* sums) {
    const float mask = p_.mask == nullptr ? 1.0f : p_.mask[token];
    if (mask == 0.0f) return;
    row_.load(static_cast<const char*>(p_.logits) + token * p_.logits_stride * size_of(p_.logits_dtype),
              p_.logits_dtype);
    float* counts = sums;
    float* prob_sums = sums + p_.num_experts;
    largest_.find(row_.logits(), p_.num_experts, p_.top_k, chosen_.data());
    for (int32_t e : chosen_) counts[e] += mask;
    for (int32_t e = 0; e < p_.num_experts; ++e) prob_sums[e] += mask * row_.probs()[e];
    const float z = row_.log_sum_exp();
    sums[2 * p_.num_experts] += mask * z * z;
  }

  const RouterStatsParams& p_;
  float* sums_;
  RouterRow row_;
  cpu::Largest largest_;
  std::vector<int32_t> chosen_;  // [K]
};

void add_up_pieces(const RouterStatsParams& p, const float* piece_sums, int64_t group) {
  const int64_t pieces = pieces_per_group(p);
  const float* sums = piece_sums + group * pieces * sums_size(p);
  float* counts = p.counts + group * p.num_experts;
  float* prob_sums = p.prob_sums + group * p.num_experts;
  std::fill_n(counts, p.num_experts, 0.0f);
  std::fill_n(prob_sums, p.num_experts, 0.0f);
  p.z_sums[group] = 0.0f;
  for (int64_t piece = 0; piece < pieces; ++piece, sums += sums_size(p)) {
    for (int32_t e = 0; e < p.num_experts; ++e) counts[e] += sums[e];
    for (int32_t e = 0; e < p.num_experts; ++e) prob_sums[e] += sums[p.num_experts + e];
    p.z_sums[group] += sums[2 * p.num_experts];
  }
}

class RouterStatsGrad {
 public:
  explicit RouterStatsGrad(const RouterStatsGradParams& params)
      : p_(params), table_(cpu::kernels()), row_(params.num_experts), grad_(static_cast<size_t>(params.num_experts)) {}

  void token(int64_t token) {
    const float mask = p_.mask == nullptr ? 1.0f : p_.mask[token];
    std::fill(grad_.begin(), grad_.end(), 0.0f);
    if (mask != 0.0f) differentiate(token, mask);
    void* target = static_cast<char*>(p_.grad_logits) + token * p_.num_experts * size_of(p_.logits_dtype);
    table_.narrow(p_.logits_dtype, grad_.data(), target, p_.num_experts);
  }

 private:
  void differentiate(int64_t token, float mask) {
    row_.load(static_cast<const char*>(p_.logits) + token * p_.logits_stride * size_of(p_.logits_dtype),
              p_.logits_dtype);
    const int64_t group = token / p_.group_size;
    const float* grad_probs = p_.grad_prob_sums + group * p_.num_experts;
    const float* probs = row_.probs();
    float product = 0.0f;
    for (int32_t e = 0; e < p_.num_experts; ++e) product += grad_probs[e] * probs[e];
    const float all = 2.0f * row_.log_sum_exp() * p_.grad_z_sums[group];
    for (int32_t e = 0; e < p_.num_experts; ++e) grad_[e] = mask * probs[e] * (grad_probs[e] - product + all);
  }

  const RouterStatsGradParams& p_;
  const cpu::KernelTable& table_;
  RouterRow row_;
  std::vector<float> grad_;  // [E]
};

}  // namespace

void run(const RouterStatsParams& params, const Parallel& parallel) {
  constexpr int64_t kPiecesPerTask = 4;
  const int64_t pieces = params.num_groups * pieces_per_group(params);
  auto* const sums = cpu::scratch<float>(parallel, pieces * sums_size(params));
  cpu::for_ranges(parallel, pieces, kPiecesPerTask, [&](int64_t begin, int64_t end) {
    RouterStats stats(params, sums);
    for (int64_t piece = begin; piece < end; ++piece) stats.piece(piece);
  });
  for (int64_t group = 0; group < params.num_groups; ++group) add_up_pieces(params, sums, group);
}

void run(const RouterStatsGradParams& params, const Parallel& parallel) {
  constexpr int64_t kLogitsPerPiece = 8 * 1024;
  if (params.num_experts <= 0) return;
  cpu::for_ranges(parallel, params.num_groups * params.group_size, ceil_div(kLogitsPerPiece, params.num_experts),
                  [&](int64_t begin, int64_t end) {
                    RouterStatsGrad grad(params);
                    for (int64_t token = begin; token < end; ++token) grad.token(token);
                  });
}

}  // namespace moekernels
