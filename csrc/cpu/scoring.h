// What choosing experts and its gradient share.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernel_table.h"

namespace moekernels::cpu {

// Where the mask has 0 for a token: weights 0 and expert ids -1. Whether it has.
inline bool leave_out(const uint8_t* mask, int64_t token, int32_t top_k, float* weights, int32_t* expert_ids) {
  if (mask == nullptr || mask[token] != 0) return false;
  for (int32_t k = 0; k < top_k; ++k) {
    weights[k] = 0.0f;
    expert_ids[k] = -1;
  }
  return true;
}

// The unit in the last place of 1.
inline float epsilon_of(DType dtype) {
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

// What the sum of a token's weights is not to fall below where they are divided by it.
inline float smallest_sum(Scoring scoring, DType probs_dtype) {
  return scoring == Scoring::kTop2Gate ? epsilon_of(probs_dtype) : 0.0f;
}

// kSparsemixer: leaves the candidates in `target`, with -inf for those farther than 2 * eps from their maximum,
// relative to the larger of it and their own size. Each operation is rounded to `dtype`, as PyTorch rounds it.
inline void keep_near_ties(const KernelTable& table, DType dtype, float eps, const float* logits,
                           const float* candidates, float maximum, float* target, int32_t n) {
  float threshold = 2.0f * eps;
  table.round(dtype, &threshold, 1);
  for (int32_t e = 0; e < n; ++e) target[e] = maximum - logits[e];
  table.round(dtype, target, n);
  for (int32_t e = 0; e < n; ++e) {
    const float size = std::fabs(logits[e]);
    target[e] /= size < maximum || std::isnan(maximum) ? maximum : size;
  }
  table.round(dtype, target, n);
  for (int32_t e = 0; e < n; ++e) {
    target[e] = target[e] > threshold ? -std::numeric_limits<float>::infinity() : candidates[e];
  }
}

}  // namespace moekernels::cpu
