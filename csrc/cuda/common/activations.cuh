// The activation functions and their slopes, accurate to a few units in the last place of float32.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "moekernels/params.h"

namespace moekernels {

// x / (1 + e^-y). Where e^-y overflows the result is 0 (NaN for x = -inf), as x * sigmoid(y) would be.
__device__ __forceinline__ float times_sigmoid(float x, float y) {
  return __fdividef(x, 1.0f + expf(-y));
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0f ? 0.0f : x;  // keeps NaN
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
    return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  } else if constexpr (kActivation == Activation::kSilu) {
    return times_sigmoid(x, x);
  } else if constexpr (kActivation == Activation::kRelu2) {
    return x < 0.0f ? 0.0f : x * x;
  } else {
    static_assert(kActivation == Activation::kNone || kActivation == Activation::kSwiglu);  // which is always gated
    return x;
  }
}

// Comparisons that are false for NaN, which stays.
__device__ __forceinline__ float clamped_gate(const Swiglu& s, float x) {
  return x > s.limit ? s.limit : x;
}
__device__ __forceinline__ float clamped_value(const Swiglu& s, float x) {
  return x > s.limit ? s.limit : x < -s.limit ? -s.limit : x;
}

template <Activation kActivation>
__device__ __forceinline__ float activate_gated(const Swiglu& swiglu, float gate, float value) {
  if constexpr (kActivation == Activation::kSwiglu) {
    const float g = clamped_gate(swiglu, gate);
    return times_sigmoid(g, swiglu.alpha * g) * (clamped_value(swiglu, value) + swiglu.shift);
  } else {
    return activate<kActivation>(gate) * value;
  }
}

struct ValueAndSlope {
  float value, slope;
};

// activate(x) and its derivative there.
template <Activation kActivation>
__device__ __forceinline__ ValueAndSlope activate_with_slope(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float below = 0.5f * (1.0f + erff(x * 0.70710678118654752f));  // the normal distribution up to x
    return {x * below, below + x * 0.39894228040143268f * expf(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float s = times_sigmoid(1.0f, 1.5957691216057308f * (x + 0.044715f * x * x * x));
    return {x * s, s + x * s * (1.0f - s) * (1.5957691216057308f + 0.21406889937880117f * x * x)};
  } else if constexpr (kActivation == Activation::kSilu) {
    const float s = times_sigmoid(1.0f, x);
    return {x * s, s + x * s * (1.0f - s)};
  } else if constexpr (kActivation == Activation::kRelu2) {
    return {x < 0.0f ? 0.0f : x * x, x < 0.0f ? 0.0f : 2.0f * x};
  } else {
    static_assert(kActivation == Activation::kNone || kActivation == Activation::kSwiglu);
    return {x, 1.0f};
  }
}

// A gated activation and its derivatives by gate and value.
struct GatedSlopes {
  float out, by_gate, by_value;
};

template <Activation kActivation>
__device__ __forceinline__ GatedSlopes gated_with_slopes(const Swiglu& swiglu, float gate, float value) {
  if constexpr (kActivation == Activation::kSwiglu) {
    const float g = clamped_gate(swiglu, gate);
    const float v = clamped_value(swiglu, value);
    const float s = times_sigmoid(1.0f, swiglu.alpha * g);
    const float factor = v + swiglu.shift;
    // What is clamped has no slope.
    return {g * s * factor, gate > swiglu.limit ? 0.0f : factor * (s + swiglu.alpha * g * s * (1.0f - s)),
            value > swiglu.limit || value < -swiglu.limit ? 0.0f : g * s};
  } else {
    const auto [act, slope] = activate_with_slope<kActivation>(gate);
    return {act * value, slope * value, act};
  }
}

// Calls body(std::integral_constant<Activation, ...>): one branch for a whole tile or row rather than one per element.
// Of the epilogue of a GEMM, which has no registers left for the bounds of kSwiglu: csrc/torch/grouped_gemm.cpp lets
// that and kRelu2 be a pass of their own.
template <class Body>
__device__ __forceinline__ void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kNone:
      return body(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kRelu2:
    case Activation::kSwiglu:
      return;
  }
}

// The same for all of them.
template <class Body>
__device__ __forceinline__ void dispatch_any_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kRelu2:
      return body(std::integral_constant<Activation, Activation::kRelu2>{});
    case Activation::kSwiglu:
      return body(std::integral_constant<Activation, Activation::kSwiglu>{});
    default:
      return dispatch_activation(activation, body);
  }
}

}  // namespace moekernels
