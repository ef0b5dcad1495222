// The scores of a token's experts, and which are largest.
//
// Comparisons order floats alike on every machine; a row with NaN, which is above everything, is left to the caller.
#pragma once

#include "cpu/isa/row_kernels.h"
#include "cpu/isa/vector_math.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

constexpr float kLowest = -__builtin_inff();

// ln(1 + e^x) = max(x, 0) + ln(1 + t) with t = e^-|x|
MOEKERNELS_INLINE VecF softplus(VecF x) {
  const VecF t = exp(x < 0.0f ? x : -x);
  const VecF rest =
      t * polynomial(t, {1.0f, -0x1.ffffbep-2f, 0x1.554c80p-2f, -0x1.ff0f88p-3f, 0x1.92f696p-3f, -0x1.397562p-3f,
                         0x1.b25362p-4f, -0x1.d29ccep-5f, 0x1.453f12p-6f, -0x1.a9336cp-9f});
  return (x > 0.0f ? x : VecF{}) + rest;
}

template <class Function>
MOEKERNELS_INLINE void map(const float* source, float* target, int64_t n, const Function& function) {
  for (int64_t i = 0; i < n; i += kLanes) store_n(target + i, function(load_n(source + i, n - i)), n - i);
}

// The scores of n experts from their logits; where `choice` is given, it becomes their sums with the bias, if any.
void score(Score score, const float* logits, const float* bias, float* scores, float* choice, int64_t n) {
  switch (score) {
    case Score::kSoftmax:
      softmax(logits, scores, n);
      break;
    case Score::kSigmoid:
      map(logits, scores, n, [](VecF x) { return times_sigmoid(set1(1.0f), x); });
      break;
    case Score::kSqrtSoftplus:
      map(logits, scores, n, [](VecF x) { return sqrt(softplus(x)); });
      break;
  }
  if (choice == nullptr) return;
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF x = load_n(scores + i, n - i);
    if (bias != nullptr) x += load_n(bias + i, n - i);
    store_n(choice + i, x, n - i);
  }
}

// Of each group of `size` neighbours the two largest, added; of a group of one itself. False if there is a NaN.
bool group_sums(const float* choice, int64_t num_groups, int64_t size, float* sums) {
  VecI nan{};
  for (int64_t g = 0; g < num_groups; ++g) {
    const float* group = choice + g * size;
    VecF first = set1(kLowest), second = first;  // in each lane
    for (int64_t i = 0; i < size; i += kLanes) {
      const VecF x = load_n(group + i, size - i, kLowest);
      nan |= x != x;
      const VecF lower = x < first ? x : first;
      second = lower > second ? lower : second;
      first = x > first ? x : first;
    }
    const float largest = max_of(first);
    const VecI is_largest = first == set1(largest);
    const float other = __builtin_popcount(mask_of(is_largest)) > 1 ? largest : max_of(is_largest ? second : first);
    sums[g] = size > 1 ? largest + other : largest;
  }
  return mask_of(nan) == 0;
}

// For each of values[0 .. n) how many are above it, or equal and before it. The others' ranks mean nothing.
template <int kVectors>
MOEKERNELS_INLINE void rank(const float* values, int64_t n, VecI (&ranks)[kVectors]) {
  VecF mine[kVectors];
  VecI place[kVectors];
  MOEKERNELS_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    mine[v] = load(values + v * kLanes);
    ranks[v] = VecI{};
    for (int lane = 0; lane < kLanes; ++lane) place[v][lane] = v * kLanes + lane;
  }
  for (int64_t i = 0; i < n; ++i) {
    const VecF other = set1(values[i]);
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      ranks[v] -= (other > mine[v]) | ((other == mine[v]) & (place[v] > static_cast<int32_t>(i)));
    }
  }
}

// Puts those of the n <= kVectors * kLanes places whose values are the k largest in order.
template <int kVectors>
MOEKERNELS_INLINE void take_largest(const float* values, const int32_t* places, int64_t n, int32_t k,
                                    int32_t* indices) {
  VecI ranks[kVectors];
  rank(values, n, ranks);
  int32_t rank_of[kVectors * kLanes], in_order[kVectors * kLanes];
  __builtin_memcpy(rank_of, ranks, sizeof ranks);
  for (int64_t i = 0; i < n; ++i) in_order[rank_of[i]] = places[i];
  for (int32_t i = 0; i < k; ++i) indices[i] = in_order[i];
}

// The k-th largest of the columns' maxima is a bound: at least k scores reach it, and where scores come in no
// particular order about one and a half times as many. These alone are compared with one another.
template <int kColumns>
bool largest_by_bound(const float* scores, int64_t n, int32_t k, int32_t* indices) {
  constexpr int kVectors = kColumns / kLanes;
  constexpr int64_t kMost = 2 * kColumns;  // that reach the bound
  VecF maxima[kVectors];
  VecI nan{};
  MOEKERNELS_UNROLL
  for (int v = 0; v < kVectors; ++v) maxima[v] = set1(kLowest);
  for (int64_t i = 0; i < n; i += kColumns) {
    MOEKERNELS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t begin = i + v * kLanes;
      const VecF x = begin < n ? load_n(scores + begin, n - begin, kLowest) : set1(kLowest);
      nan |= x != x;
      maxima[v] = x > maxima[v] ? x : maxima[v];
    }
  }
  if (mask_of(nan) != 0) return false;

  float values[kMost] = {};
  int32_t places[kMost];
  if (n <= kColumns) {
    for (int32_t i = 0; i < n; ++i) {
      places[i] = i;
      values[i] = scores[i];
    }
    take_largest<kVectors>(values, places, n, k, indices);
    return true;
  }
  VecI ranks[kVectors];
  VecF bounds = set1(kLowest);
  MOEKERNELS_UNROLL
  for (int v = 0; v < kVectors; ++v) store(values + v * kLanes, maxima[v]);
  rank(values, kColumns, ranks);
  MOEKERNELS_UNROLL
  for (int v = 0; v < kVectors; ++v) bounds = ranks[v] == k - 1 ? maxima[v] : bounds;
  const float bound = max_of(bounds);
  if (bound == kLowest) return false;  // which all reach

  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t reach = 0;
    for (int64_t i = begin; i < n && i < begin + 64; i += kLanes) {
      reach |= uint64_t(mask_of(load_n(scores + i, n - i, kLowest) >= bound)) << (i - begin);
    }
    if (found + __builtin_popcountll(reach) > kMost) return false;
    for (; reach != 0; reach &= reach - 1) {
      const int64_t place = begin + __builtin_ctzll(reach);
      places[found] = static_cast<int32_t>(place);
      values[found++] = scores[place];
    }
  }
  if (found <= kColumns) {
    take_largest<kVectors>(values, places, found, k, indices);
  } else {
    take_largest<2 * kVectors>(values, places, found, k, indices);
  }
  return true;
}

// The indices of the k largest of n >= k scores, the largest first, the lowest index first among equal ones. False,
// and nothing done, where another way is needed or better: there is a NaN, k is large, or very many are equal.
bool largest(const float* scores, int64_t n, int32_t k, int32_t* indices) {
  if (k <= 8) return largest_by_bound<16>(scores, n, k, indices);
  if (k <= 16) return largest_by_bound<32>(scores, n, k, indices);
  return k <= 32 && largest_by_bound<64>(scores, n, k, indices);
}

}  // namespace
}  // namespace moekernels::cpu
