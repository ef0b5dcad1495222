// Probabilities over a row of logits: over all of them, or over the near-ties of kSparsemixer.
#pragma once

#include "cuda/routing/router_rows.cuh"

namespace moekernels {

// ---- rounding ----

// By selection, not by branches: it stands in unrolled loops.
__device__ __forceinline__ float round_to(DType dtype, float x) {
  const float bf16 = to_float(from_float<__nv_bfloat16>(x));
  const float fp16 = to_float(from_float<__half>(x));
  return dtype == DType::kFloat32 ? x : dtype == DType::kBFloat16 ? bf16 : fp16;
}

// The unit in the last place of 1.
__device__ __forceinline__ float epsilon_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-7f : dtype == DType::kFloat16 ? 0x1p-10f : 0x1p-23f;
}

// ---- softmax ----

// Probabilities over a row, rounded to `dtype`. A NaN anywhere, a +inf, or nothing but -inf makes all of them NaN.
struct Softmax {
  float maximum;
  float sum;
  float reciprocal;  // of the sum
  DType dtype;

  template <class Row>
  __device__ __forceinline__ Softmax(const Row& row, DType dtype_) : dtype(dtype_) {
    uint32_t best = kNoKey;
    row.for_each([&](int, float logit) {
      const uint32_t key = key_of(logit);
      best = key > best ? key : best;
    });
    maximum = score_of(Row::Lanes::max(best));
    float part = 0.0f;
    row.for_each([&](int, float logit) { part += expf(logit - maximum); });
    sum = Row::Lanes::sum(part);
    reciprocal = 1.0f / sum;
  }

  __device__ __forceinline__ float operator()(float logit) const {
    // exp / sum, rounded correctly like a division but without its branch: the sum is at least 1 (or NaN), so that no
    // step overflows.
    const float numerator = expf(logit - maximum);
    const float quotient = numerator * reciprocal;
    return round_to(dtype, fmaf(fmaf(-quotient, sum, numerator), reciprocal, quotient));
  }

  // Infinity has no probability, but is the sum all the same. (NaN would be the maximum.)
  __device__ __forceinline__ float log_sum_exp() const {
    return fabsf(maximum) == INFINITY ? maximum : maximum + logf(sum);
  }
};

// ---- near-ties ----

// A candidate of kSparsemixer's choice k is any expert but the first choice; the near-ties are those that lie within
// the threshold of the largest candidate, relative to the larger of it and their own size. Each operation is rounded to
// the dtype of the logits, as PyTorch rounds it.
struct NearTies {
  int32_t removed;  // the first choice, or -1
  float maximum;    // of the candidates
  float threshold;
  float sum;  // of exp(candidate - maximum) over the near-ties
  DType dtype;

  template <class Row>
  __device__ __forceinline__ NearTies(const Row& row, int32_t removed_, float maximum_, float eps, DType dtype_)
      : removed(removed_), maximum(maximum_), threshold(round_to(dtype_, 2.0f * eps)), dtype(dtype_) {
    float part = 0.0f;
    row.for_each([&](int expert, float logit) {
      if (!is_far(logit)) part += expf(candidate(removed, expert, logit) - maximum);
    });
    sum = Row::Lanes::sum(part);
  }

  static __device__ __forceinline__ float lowest() { return -__uint_as_float(0x7f800000u); }

  static __device__ __forceinline__ float candidate(int32_t removed, int expert, float logit) {
    return expert == removed ? lowest() : logit;
  }

  __device__ __forceinline__ bool is_far(float logit) const {
    const float size = fabsf(logit);
    const float factor = size < maximum || maximum != maximum ? maximum : size;
    return round_to(dtype, round_to(dtype, maximum - logit) / factor) > threshold;
  }

  // The candidate, or -inf where it is far.
  __device__ __forceinline__ float masked(int expert, float logit) const {
    return is_far(logit) ? lowest() : candidate(removed, expert, logit);
  }

  // A softmax over the near-ties, not rounded.
  __device__ __forceinline__ float probability(float masked) const { return expf(masked - maximum) / sum; }
};

}  // namespace moekernels
