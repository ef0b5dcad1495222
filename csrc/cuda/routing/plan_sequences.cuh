// The sequences that plan.cu sorts. A sequence has num_positions and num_bins; bin(p), the bin of a position or kNoBin;
// and what to do with the results:
//   prepare(p)        for each position, before any row is known
//   place(p, row)     for each position with a bin
//   leave_out(p)      for each position without
//   start(bin, row)   for each bin, and for the end of the last one as start(num_bins, row)
//   past_end(row)     for each row from there to num_positions
#pragma once

#include <cstdint>

namespace moekernels {
namespace {

constexpr int32_t kNoBin = -1;

__device__ __forceinline__ int32_t divide(int32_t a, int32_t b) {  // neither negative
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

__device__ __forceinline__ bool is_index(int32_t i, int32_t size) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(size);
}

// The slots (token, choice), numbered token * top_k + choice: N = T * K of them, below 2^31.
struct Slots {
  int32_t num_tokens;
  int32_t top_k;
  int32_t group_size;  // in tokens, at least 1

  __device__ __forceinline__ int32_t token(int32_t slot) const { return divide(slot, top_k); }
  __device__ __forceinline__ int32_t group(int32_t slot) const { return divide(token(slot), group_size); }
};

struct GroupOrder {
  const int32_t* token_order;
  int32_t* grouped_order;  // [T]: token_order by group; -1 past the last valid token
  Slots slots;
  int32_t num_positions;
  int32_t num_bins;

  __device__ __forceinline__ int32_t bin(int32_t p) const {
    const int32_t token = token_order[p];
    return is_index(token, slots.num_tokens) ? divide(token, slots.group_size) : kNoBin;
  }
  __device__ __forceinline__ void prepare(int32_t) const {}
  __device__ __forceinline__ void place(int32_t p, int32_t row) const { grouped_order[row] = token_order[p]; }
  __device__ __forceinline__ void leave_out(int32_t) const {}
  __device__ __forceinline__ void start(int32_t, int32_t) const {}
  __device__ __forceinline__ void past_end(int32_t row) const { grouped_order[row] = -1; }
};

struct ClaimOrder {
  const int32_t* expert_ids;
  const int32_t* token_order;  // nullable; by group
  int32_t* slot_of_claim;      // [N]
  int32_t* claim_of_slot;      // [N]; -1: the token is missing from token_order
  Slots slots;
  int32_t num_positions;
  int32_t num_bins;

  // The slot at a position, or -1.
  __device__ __forceinline__ int32_t slot(int32_t p) const {
    const int32_t group = divide(p, slots.group_size * slots.top_k);
    const int32_t first_token = group * slots.group_size;
    const int32_t rest = slots.num_tokens - first_token;
    const int32_t num_tokens = rest < slots.group_size ? rest : slots.group_size;
    const int32_t within_group = p - first_token * slots.top_k;
    const int32_t choice = divide(within_group, num_tokens);
    const int32_t place = first_token + within_group - choice * num_tokens;
    const int32_t token = token_order == nullptr ? place : token_order[place];
    return is_index(token, slots.num_tokens) ? token * slots.top_k + choice : -1;
  }

  __device__ __forceinline__ int32_t bin(int32_t p) const {
    const int32_t s = slot(p);
    if (s < 0) return kNoBin;
    const int32_t expert_id = expert_ids[s];
    return is_index(expert_id, num_bins) ? expert_id : kNoBin;
  }
  __device__ __forceinline__ void prepare(int32_t s) const {
    if (token_order != nullptr) claim_of_slot[s] = -1;
  }
  __device__ __forceinline__ void place(int32_t p, int32_t row) const {
    const int32_t s = slot(p);
    slot_of_claim[row] = s;
    claim_of_slot[s] = row;
  }
  __device__ __forceinline__ void leave_out(int32_t) const {}
  __device__ __forceinline__ void start(int32_t, int32_t) const {}
  __device__ __forceinline__ void past_end(int32_t) const {}
};

struct RowOrder {
  const int32_t* expert_ids;
  const int32_t* slot_of_claim;  // null without a capacity
  const int32_t* claim_of_slot;
  int32_t* expert_offsets;
  int32_t* token_of_row;
  int32_t* row_of_slot;
  int32_t capacity;
  Slots slots;
  int32_t num_positions;
  int32_t num_bins;

  __device__ __forceinline__ bool has_place(int32_t slot, int32_t expert_id) const {
    const int32_t claim = claim_of_slot[slot];
    if (claim < capacity) return claim >= 0;
    const int32_t earlier = slot_of_claim[claim - capacity];
    return expert_ids[earlier] != expert_id || slots.group(earlier) != slots.group(slot);
  }

  __device__ __forceinline__ int32_t bin(int32_t slot) const {
    const int32_t expert_id = expert_ids[slot];
    if (!is_index(expert_id, num_bins)) return kNoBin;
    return slot_of_claim == nullptr || has_place(slot, expert_id) ? expert_id : kNoBin;
  }
  __device__ __forceinline__ void prepare(int32_t) const {}
  __device__ __forceinline__ void place(int32_t slot, int32_t row) const {
    row_of_slot[slot] = row;
    token_of_row[row] = slots.token(slot);
  }
  __device__ __forceinline__ void leave_out(int32_t slot) const { row_of_slot[slot] = -1; }
  __device__ __forceinline__ void start(int32_t expert, int32_t row) const { expert_offsets[expert] = row; }
  __device__ __forceinline__ void past_end(int32_t row) const { token_of_row[row] = -1; }
};

}  // namespace
}  // namespace moekernels
