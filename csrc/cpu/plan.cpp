// expert_ids [T, K] -> expert_offsets [E + 1], token_of_row [N], row_of_slot [T, K]
//
// A stable counting sort of the slots by expert, on one thread: about a nanosecond per slot and pass.
//   claim   with a capacity, slots claim places in their order of priority; the losers are marked -1
//   count   rows per expert, summed up to offsets
//   place   slots in (token, choice) order take the next row of their expert
#include <cstring>

#include "common/rounding.h"
#include "cpu/parallel.h"

namespace moekernels {
namespace {

int64_t tokens_per_group(const PlanParams& p) {
  return p.group_size > 0 ? p.group_size : (p.num_tokens > 0 ? p.num_tokens : 1);
}

// Claim counters: one per expert while groups come one after the other, one per (group, expert) where an order is
// given.
int64_t num_claim_counters(const PlanParams& p) {
  if (p.capacity < 0) return 0;
  const int64_t groups = p.token_order == nullptr ? 1 : ceil_div(p.num_tokens, tokens_per_group(p));
  return groups * p.num_experts;
}

constexpr int32_t kKept = 0;
constexpr int32_t kDropped = -1;

class Plan {
 public:
  Plan(const PlanParams& params, const Parallel& parallel)
      : p_(params),
        next_row_(cpu::scratch<int32_t>(parallel, params.num_experts + num_claim_counters(params))),
        claimed_(next_row_ + params.num_experts) {}

  void run() {
    const bool limited = p_.capacity >= 0;
    if (limited) claim();
    count(limited);
    place(limited);
  }

 private:
  bool is_expert(int32_t id) const { return static_cast<uint32_t>(id) < static_cast<uint32_t>(p_.num_experts); }

  void claim_slot(int64_t slot, int32_t* claimed) {
    const int32_t id = p_.expert_ids[slot];
    p_.row_of_slot[slot] = is_expert(id) && claimed[id]++ < p_.capacity ? kKept : kDropped;
  }

  void claim() {
    const int64_t group_size = tokens_per_group(p_);
    const int64_t bytes = num_claim_counters(p_) * static_cast<int64_t>(sizeof(int32_t));
    if (p_.token_order == nullptr) {
      for (int64_t begin = 0; begin < p_.num_tokens; begin += group_size) {
        const int64_t end = group_size < p_.num_tokens - begin ? begin + group_size : p_.num_tokens;
        std::memset(claimed_, 0, static_cast<size_t>(bytes));
        for (int32_t k = 0; k < p_.top_k; ++k) {
          for (int64_t t = begin; t < end; ++t) claim_slot(t * p_.top_k + k, claimed_);
        }
      }
      return;
    }
    std::memset(claimed_, 0, static_cast<size_t>(bytes));
    for (int64_t slot = 0; slot < p_.num_tokens * p_.top_k; ++slot) p_.row_of_slot[slot] = kDropped;
    for (int32_t k = 0; k < p_.top_k; ++k) {
      for (int64_t i = 0; i < p_.num_tokens; ++i) {
        const int64_t t = p_.token_order[i];
        if (t < 0 || t >= p_.num_tokens) continue;
        claim_slot(t * p_.top_k + k, claimed_ + t / group_size * p_.num_experts);
      }
    }
  }

  void count(bool limited) {
    std::memset(next_row_, 0, static_cast<size_t>(p_.num_experts) * sizeof(int32_t));
    for (int64_t slot = 0; slot < p_.num_tokens * p_.top_k; ++slot) {
      const int32_t id = p_.expert_ids[slot];
      if (is_expert(id) && !(limited && p_.row_of_slot[slot] == kDropped)) ++next_row_[id];
    }
    int32_t row = 0;
    for (int32_t e = 0; e < p_.num_experts; ++e) {
      const int32_t rows = next_row_[e];
      p_.expert_offsets[e] = next_row_[e] = row;
      row += rows;
    }
    p_.expert_offsets[p_.num_experts] = row;
  }

  void place(bool limited) {
    int64_t slot = 0;
    for (int64_t t = 0; t < p_.num_tokens; ++t) {
      for (int32_t k = 0; k < p_.top_k; ++k, ++slot) {
        const int32_t id = p_.expert_ids[slot];
        int32_t row = kDropped;
        if (is_expert(id) && !(limited && p_.row_of_slot[slot] == kDropped)) {
          row = next_row_[id]++;
          p_.token_of_row[row] = static_cast<int32_t>(t);
        }
        p_.row_of_slot[slot] = row;
      }
    }
    for (int64_t row = p_.expert_offsets[p_.num_experts]; row < slot; ++row) p_.token_of_row[row] = -1;
  }

  const PlanParams& p_;
  int32_t* next_row_;  // [E]
  int32_t* claimed_;
};

}  // namespace

void run(const PlanParams& params, const Parallel& parallel) {
  Plan(params, parallel).run();
}

}  // namespace moekernels
