// Vectorised activations and their gradients, one row after the other.
#pragma once

#include "cpu/isa/parts.h"
#include "cpu/isa/vector_math.h"
#include "cpu/kernel_table.h"

namespace moekernels::cpu {
namespace {

// The columns of a gated row [2F]: F gates, then F values; or, interleaved, F pairs of both.
template <class T>
class GatedRow {
 public:
  template <class Params>
  GatedRow(const Params& p, T* row)
      : row_(row), width_(p.width), interleaved_(p.activation == Activation::kSwiglu && p.swiglu.interleaved) {}

  // Columns c .. c + n, at most a vector.
  void load(int64_t c, int64_t n, VecF& gate, VecF& value) const {
    if (!interleaved_) {
      gate = load_n(row_ + c, n);
      value = load_n(row_ + width_ + c, n);
      return;
    }
    T gates[kLanes] = {}, values[kLanes] = {};
    for (int64_t i = 0; i < min(n, kLanes); ++i) {
      gates[i] = row_[2 * (c + i)];
      values[i] = row_[2 * (c + i) + 1];
    }
    gate = load_n(gates, kLanes);
    value = load_n(values, kLanes);
  }

  void store(int64_t c, int64_t n, VecF gate, VecF value) const {
    if (!interleaved_) {
      store_n(row_ + c, gate, n);
      store_n(row_ + width_ + c, value, n);
      return;
    }
    T gates[kLanes], values[kLanes];
    store_n(gates, gate, kLanes);
    store_n(values, value, kLanes);
    for (int64_t i = 0; i < min(n, kLanes); ++i) {
      row_[2 * (c + i)] = gates[i];
      row_[2 * (c + i) + 1] = values[i];
    }
  }

 private:
  T* const row_;
  const int64_t width_;
  const bool interleaved_;
};

template <class T>
void activation_of_rows(const ActivationParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* linear = const_cast<T*>(static_cast<const T*>(p.linear)) + row * p.width * (p.gated ? 2 : 1);
    const GatedRow<T> gated(p, linear);
    T* out = static_cast<T*>(p.out) + row * p.width;
    for (int64_t c = 0; c < p.width; c += kLanes) {
      const int64_t n = p.width - c;
      VecF x, value{};
      if (p.gated) {
        gated.load(c, n, x, value);
      } else {
        x = load_n(linear + c, n);
      }
      if (p.activation == Activation::kSwiglu) {
        x = swiglu(p.swiglu, x, value);
      } else {
        x = activate(p.activation, x);
        if (p.gated) x *= value;
      }
      store_n(out + c, x, n);
    }
  }
}

void activation(const ActivationParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return activation_of_rows<float>(p, row_begin, row_end);
    case DType::kBFloat16:
      return activation_of_rows<BFloat16>(p, row_begin, row_end);
    case DType::kFloat16:
      return activation_of_rows<Float16>(p, row_begin, row_end);
  }
}

template <class T>
class ActivationGrad {
 public:
  explicit ActivationGrad(const ActivationGradParams& params)
      : p_(params), linear_width_(params.gated ? 2 * params.width : params.width) {}

  // Outputs may lie where inputs do: each vector is read before anything is written in its place.
  void row(int64_t row) const {
    T* linear = const_cast<T*>(static_cast<const T*>(p_.linear)) + row * linear_width_;
    T* grad_linear = static_cast<T*>(p_.grad_linear) + row * linear_width_;
    const GatedRow<T> gated(p_, linear), gated_grad(p_, grad_linear);
    const T* grad_out = static_cast<const T*>(p_.grad_out) + row * p_.width;
    T* scaled = p_.scaled == nullptr ? nullptr : static_cast<T*>(p_.scaled) + row * p_.width;
    const float scale = p_.row_scale == nullptr ? 1.0f : p_.row_scale[row];
    VecF sums{};
    for (int64_t c = 0; c < p_.width; c += kLanes) {
      const int64_t n = p_.width - c;
      const VecF grad = load_n(grad_out + c, n);
      const VecF scaled_grad = scale * grad;
      VecF out;
      if (p_.gated) {
        VecF gate, value;
        gated.load(c, n, gate, value);
        const GatedSlopes slopes = gated_with_slopes(p_.activation, p_.swiglu, gate, value);
        out = slopes.out;
        gated_grad.store(c, n, scaled_grad * slopes.by_gate, scaled_grad * slopes.by_value);
      } else {
        const ValueAndSlope act = activate_with_slope(p_.activation, load_n(linear + c, n));
        out = act.value;
        store_n(grad_linear + c, scaled_grad * act.slope, n);
      }
      if (scaled != nullptr) store_n(scaled + c, scale * out, n);
      sums = fma(grad, out, sums);
    }
    if (p_.grad_scale != nullptr) p_.grad_scale[row] = sum_of(sums);
  }

  void zero_row(int64_t row) const {
    const uint64_t width_bytes = static_cast<uint64_t>(p_.width) * sizeof(T);
    __builtin_memset(static_cast<T*>(p_.grad_linear) + row * linear_width_, 0,
                     p_.gated ? 2 * width_bytes : width_bytes);
    if (p_.scaled != nullptr) __builtin_memset(static_cast<T*>(p_.scaled) + row * p_.width, 0, width_bytes);
    if (p_.grad_scale != nullptr) p_.grad_scale[row] = 0.0f;
  }

  void rows(int64_t row_begin, int64_t row_end) const {
    const int64_t used = p_.expert_offsets == nullptr ? p_.num_rows : p_.expert_offsets[p_.num_experts];
    for (int64_t i = row_begin; i < row_end; ++i) i < used ? row(i) : zero_row(i);
  }

 private:
  const ActivationGradParams& p_;
  const int64_t linear_width_;
};

void activation_grad(const ActivationGradParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return ActivationGrad<float>(p).rows(row_begin, row_end);
    case DType::kBFloat16:
      return ActivationGrad<BFloat16>(p).rows(row_begin, row_end);
    case DType::kFloat16:
      return ActivationGrad<Float16>(p).rows(row_begin, row_end);
  }
}

}  // namespace
}  // namespace moekernels::cpu
