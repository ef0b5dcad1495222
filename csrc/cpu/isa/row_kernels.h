// Vectorised loops over single rows: un-permutation, its gradient, and the pieces of the router.
#pragma once

#include "cpu/isa/vector_math.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]], some vectors of columns at a time
template <class T>
void unpermute_tokens(const UnpermuteParams& p, int64_t token_begin, int64_t token_end) {
  constexpr int kVectors = 8;
  const T* rows = static_cast<const T*>(p.rows);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int32_t* row_of_slot = p.row_of_slot + token * p.top_k;
    const float* weights = p.weights == nullptr ? nullptr : p.weights + token * p.top_k;
    T* out = static_cast<T*>(p.out) + token * p.hidden_size;
    for (int64_t begin = 0; begin < p.hidden_size; begin += kVectors * kLanes) {
      const int64_t n = p.hidden_size - begin;
      VecF sums[kVectors];
      MOEKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[v] = VecF{};
      for (int32_t k = 0; k < p.top_k; ++k) {
        const int64_t row = row_of_slot[k];
        if (row < 0 || row >= p.num_rows) continue;
        const T* source = rows + row * p.row_stride + begin;
        const VecF weight = set1(weights == nullptr ? 1.0f : weights[k]);
        MOEKERNELS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          if (v * kLanes < n) sums[v] = fma(weight, load_n(source + v * kLanes, n - v * kLanes), sums[v]);
        }
      }
      MOEKERNELS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes < n) store_n(out + begin + v * kLanes, sums[v], n - v * kLanes);
      }
    }
  }
}

void unpermute(const UnpermuteParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return unpermute_tokens<float>(p, token_begin, token_end);
    case DType::kBFloat16:
      return unpermute_tokens<BFloat16>(p, token_begin, token_end);
    case DType::kFloat16:
      return unpermute_tokens<Float16>(p, token_begin, token_end);
  }
}

// grad_rows[i] = weight of the row's slot * grad_out[token]; a row that no slot names becomes zero
template <class T>
void unpermute_grad_to_rows(const UnpermuteGradParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* target = static_cast<T*>(p.grad_rows) + row * p.hidden_size;
    const int64_t token = p.token_of_row[row];
    bool named = false;
    float weight = 0.0f;
    for (int32_t k = 0; token >= 0 && token < p.num_tokens && k < p.top_k; ++k) {
      const int64_t slot = token * p.top_k + k;
      if (p.row_of_slot[slot] != row) continue;
      named = true;
      weight += p.weights == nullptr ? 1.0f : p.weights[slot];
    }
    if (!named) {
      __builtin_memset(target, 0, static_cast<uint64_t>(p.hidden_size) * sizeof(T));
      continue;
    }
    const T* source = static_cast<const T*>(p.grad_out) + token * p.grad_stride;
    for (int64_t c = 0; c < p.hidden_size; c += kLanes) {
      const int64_t n = p.hidden_size - c;
      store_n(target + c, weight * load_n(source + c, n), n);
    }
  }
}

void unpermute_grad_rows(const UnpermuteGradParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return unpermute_grad_to_rows<float>(p, row_begin, row_end);
    case DType::kBFloat16:
      return unpermute_grad_to_rows<BFloat16>(p, row_begin, row_end);
    case DType::kFloat16:
      return unpermute_grad_to_rows<Float16>(p, row_begin, row_end);
  }
}

template <class T>
float dot_product(const T* a, const T* b, int64_t n) {
  constexpr int kSums = 4;
  VecF sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    MOEKERNELS_UNROLL
    for (int v = 0; v < kSums; ++v) sums[v] = fma(load(a + i + v * kLanes), load(b + i + v * kLanes), sums[v]);
  }
  for (; i < n; i += kLanes) sums[0] = fma(load_n(a + i, n - i), load_n(b + i, n - i), sums[0]);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// grad_weights[t, k] = <grad_out[t], rows[row_of_slot[t, k]]>
template <class T>
void unpermute_grad_to_weights(const UnpermuteGradParams& p, int64_t token_begin, int64_t token_end) {
  for (int64_t slot = token_begin * p.top_k; slot < token_end * p.top_k; ++slot) {
    const int64_t row = p.row_of_slot[slot];
    const T* grad = static_cast<const T*>(p.grad_out) + slot / p.top_k * p.grad_stride;
    const T* rows = static_cast<const T*>(p.rows);
    p.grad_weights[slot] =
        row < 0 || row >= p.num_rows ? 0.0f : dot_product(grad, rows + row * p.row_stride, p.hidden_size);
  }
}

void unpermute_grad_weights(const UnpermuteGradParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return unpermute_grad_to_weights<float>(p, token_begin, token_end);
    case DType::kBFloat16:
      return unpermute_grad_to_weights<BFloat16>(p, token_begin, token_end);
    case DType::kFloat16:
      return unpermute_grad_to_weights<Float16>(p, token_begin, token_end);
  }
}

template <class T>
void widen_values(const void* source, float* target, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_n(target + i, load_n(static_cast<const T*>(source) + i, n - i), n - i);
}

void widen(DType dtype, const void* source, float* target, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return widen_values<float>(source, target, n);
    case DType::kBFloat16:
      return widen_values<BFloat16>(source, target, n);
    case DType::kFloat16:
      return widen_values<Float16>(source, target, n);
  }
}

template <class T>
void narrow_values(const float* source, void* target, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_n(static_cast<T*>(target) + i, load_n(source + i, n - i), n - i);
}

void narrow(DType dtype, const float* source, void* target, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return narrow_values<float>(source, target, n);
    case DType::kBFloat16:
      return narrow_values<BFloat16>(source, target, n);
    case DType::kFloat16:
      return narrow_values<Float16>(source, target, n);
  }
}

template <class T>
void round_values(float* values, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    T rounded[kLanes];
    store(rounded, load_n(values + i, n - i));
    store_n(values + i, load(rounded), n - i);
  }
}

void round(DType dtype, float* values, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return;
    case DType::kBFloat16:
      return round_values<BFloat16>(values, n);
    case DType::kFloat16:
      return round_values<Float16>(values, n);
  }
}

// A NaN anywhere, a +inf, or nothing but -inf makes the whole row NaN, as in PyTorch.
void softmax(const float* logits, float* probs, int64_t n) {
  const float lowest = -__builtin_inff();
  VecF maxima = set1(lowest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF x = load_n(logits + i, n - i, lowest);
    maxima = x > maxima ? x : maxima;
  }
  float maximum = lowest;
  for (int lane = 0; lane < kLanes; ++lane) maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
  VecF sums{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF x = exp(load_n(logits + i, n - i, lowest) - maximum);
    sums += x;
    store_n(probs + i, x, n - i);
  }
  const float sum = sum_of(sums);
  for (int64_t i = 0; i < n; i += kLanes) store_n(probs + i, load_n(probs + i, n - i) / sum, n - i);
}

}  // namespace
}  // namespace moekernels::cpu
