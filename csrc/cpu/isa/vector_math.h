// exp, erf, the activations and their slopes, to float32 accuracy. The polynomials are minimax fits of this project.
#pragma once

#include "cpu/isa/simd.h"
#include "moekernels/params.h"

namespace moekernels::cpu {
namespace {

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1)
template <int n>
MOEKERNELS_INLINE VecF polynomial(VecF x, const float (&c)[n]) {
  VecF y = set1(c[n - 1]);
  MOEKERNELS_UNROLL
  for (int i = n - 2; i >= 0; --i) y = fma(y, x, set1(c[i]));
  return y;
}

// e^x = 2^n * e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. NaN stays NaN; what float32 cannot hold becomes
// infinity or zero.
MOEKERNELS_INLINE VecF exp(VecF x) {
  constexpr float kRoundingShift = 0x1.8p23f;  // a sum with it has no bits left for a fraction
  x = x > 89.0f ? set1(89.0f) : x;
  x = x < -104.0f ? set1(-104.0f) : x;
  const VecF n = fma(x, set1(0x1.715476p+0f), set1(kRoundingShift)) - kRoundingShift;
  VecF r = fma(n, set1(-0x1.62e4p-1f), x);  // ln 2 in two parts, the first so short that n times it is exact
  r = fma(n, set1(-0x1.7f7d1cp-20f), r);
  return times_power_of_2(
      polynomial(r, {1.0f, 1.0f, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f}), n);
}

// |x| <= 1: x times a polynomial in x^2. Beyond: 1 - e^(-x p(x)), which is 1 in float32 from 4 on.
MOEKERNELS_INLINE VecF erf(VecF x) {
  const VecF square = x * x;
  const VecF inner = x * polynomial(square, {0x1.20dd74p+0f, -0x1.81273ep-2f, 0x1.ce2d20p-4f, -0x1.b7fbb4p-6f,
                                             0x1.5419f6p-8f, -0x1.a485ecp-11f, 0x1.4ae4d0p-14f});
  VecF size = x < 0.0f ? -x : x;
  size = size > 4.0f ? set1(4.0f) : size;
  const VecF tail =
      1.0f - exp(-size * polynomial(size, {0x1.20ee9ep+0f, 0x1.453682p-1f, 0x1.b2f1c8p-4f, -0x1.84a1acp-6f,
                                           0x1.dadcf8p-9f, -0x1.4d8278p-12f, 0x1.6926dep-17f}));
  return square <= 1.0f ? inner : (x < 0.0f ? -tail : tail);
}

MOEKERNELS_INLINE VecF times_sigmoid(VecF x, VecF y) {
  return x / (1.0f + exp(-y));
}

MOEKERNELS_INLINE VecF activate(Activation activation, VecF x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0f ? VecF{} : x;
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f));
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
      return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
    case Activation::kSilu:
      return times_sigmoid(x, x);
    case Activation::kRelu2:
      return x < 0.0f ? VecF{} : x * x;
    case Activation::kSwiglu:  // takes the value too
      return x;
  }
  return x;
}

// Comparisons that are false for NaN, which stays.
MOEKERNELS_INLINE VecF clamped_gate(const Swiglu& s, VecF x) {
  return x > s.limit ? set1(s.limit) : x;
}
MOEKERNELS_INLINE VecF clamped_value(const Swiglu& s, VecF x) {
  return x > s.limit ? set1(s.limit) : x < -s.limit ? set1(-s.limit) : x;
}

MOEKERNELS_INLINE VecF swiglu(const Swiglu& s, VecF gate, VecF value) {
  const VecF g = clamped_gate(s, gate);
  return times_sigmoid(g, s.alpha * g) * (clamped_value(s, value) + s.shift);
}

struct ValueAndSlope {
  VecF value, slope;
};

// activate(x) and its derivative there.
MOEKERNELS_INLINE ValueAndSlope activate_with_slope(Activation activation, VecF x) {
  switch (activation) {
    case Activation::kNone:
      return {x, set1(1.0f)};
    case Activation::kRelu:
      return {x < 0.0f ? VecF{} : x, x <= 0.0f ? VecF{} : set1(1.0f)};
    case Activation::kGelu: {
      const VecF below = 0.5f * (1.0f + erf(x * 0.70710678118654752f));  // the normal distribution up to x
      return {x * below, below + x * 0.39894228040143268f * exp(-0.5f * x * x)};
    }
    case Activation::kGeluTanh: {
      const VecF s = times_sigmoid(set1(1.0f), 1.5957691216057308f * (x + 0.044715f * x * x * x));
      return {x * s, s + x * s * (1.0f - s) * (1.5957691216057308f + 0.21406889937880117f * x * x)};
    }
    case Activation::kSilu: {
      const VecF s = times_sigmoid(set1(1.0f), x);
      return {x * s, s + x * s * (1.0f - s)};
    }
    case Activation::kRelu2:
      return {x < 0.0f ? VecF{} : x * x, x < 0.0f ? VecF{} : 2.0f * x};
    case Activation::kSwiglu:  // has a slope for the value too
      break;
  }
  return {x, set1(1.0f)};
}

// A gated activation and its derivatives by gate and value.
struct GatedSlopes {
  VecF out, by_gate, by_value;
};

MOEKERNELS_INLINE GatedSlopes gated_with_slopes(Activation activation, const Swiglu& swiglu, VecF gate, VecF value) {
  if (activation != Activation::kSwiglu) {
    const ValueAndSlope act = activate_with_slope(activation, gate);
    return {act.value * value, act.slope * value, act.value};
  }
  const VecF g = clamped_gate(swiglu, gate);
  const VecF v = clamped_value(swiglu, value);
  const VecF s = times_sigmoid(set1(1.0f), swiglu.alpha * g);
  const VecF factor = v + swiglu.shift;
  const VecF slope = factor * (s + swiglu.alpha * g * s * (1.0f - s));
  // What is clamped has no slope.
  return {g * s * factor, gate > swiglu.limit ? VecF{} : slope,
          value > swiglu.limit    ? VecF{}
          : value < -swiglu.limit ? VecF{}
                                  : g * s};
}

}  // namespace
}  // namespace moekernels::cpu
