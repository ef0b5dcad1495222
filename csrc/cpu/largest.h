// The k largest scores of a row: what every choice of experts is made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernel_table.h"

namespace moekernels::cpu {

// Finds the k largest of a row's scores: NaN above everything, -0 equal to +0, the lower index first among equal ones.
class Largest {
 public:
  explicit Largest(int32_t max_k) : in_kernel_(kernels().largest), best_(static_cast<size_t>(max_k)) {}

  // Leaves the indices of the k <= max_k largest of n scores in `indices`, the largest first.
  void find(const float* scores, int32_t n, int32_t k, int32_t* indices) {
    if (k <= n && in_kernel_(scores, n, k, indices)) return;
    int32_t found = 0;
    float smallest = 0.0f;  // of the k found so far
    for (int32_t i = 0; i < n; ++i) {
      if (found == k && scores[i] <= smallest) continue;  // the common case; never taken for a NaN
      const uint64_t key = key_of(scores[i], i);
      if (found == k && key < best_[k - 1]) continue;
      int32_t place = found < k ? found++ : k - 1;
      for (; place > 0 && best_[place - 1] < key; --place) best_[place] = best_[place - 1];
      best_[place] = key;
      if (found == k) smallest = scores[index_of(best_[k - 1])];
    }
    for (int32_t i = 0; i < found; ++i) indices[i] = index_of(best_[i]);
  }

 private:
  // Orders floats as integers.
  static uint32_t sortable(float x) {
    if (std::isnan(x)) return 0xffffffffu;
    x += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  }

  // Larger for larger scores, and for lower indices among equal ones.
  static uint64_t key_of(float score, int32_t index) {
    return static_cast<uint64_t>(sortable(score)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
  }

  static int32_t index_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

  bool (*const in_kernel_)(const float* scores, int64_t n, int32_t k, int32_t* indices);
  std::vector<uint64_t> best_;  // [k]
};

}  // namespace moekernels::cpu
