// Vectorised activations and their gradients, one row after the other.
#pragma once

#include "kernel_table.h"
#include "vector_math.h"

namespace moekernels::cpu {
namespace {

template <class T>
void activation_of_rows(const ActivationParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* gate = static_cast<const T*>(p.linear) + row * p.width * (p.gated ? 2 : 1);
    const T* value = p.gated ? gate + p.width : nullptr;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for (int64_t c = 0; c < p.width; c += kLanes) {
      const int64_t n = p.width - c;
      VecF x = activate(p.activation, load_n(gate + c, n));
      if (value != nullptr) x *= load_n(value + c, n);
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
    const T* gate = static_cast<const T*>(p_.linear) + row * linear_width_;
    const T* value = p_.gated ? gate + p_.width : nullptr;
    const T* grad_out = static_cast<const T*>(p_.grad_out) + row * p_.width;
    T* grad_gate = static_cast<T*>(p_.grad_linear) + row * linear_width_;
    T* grad_value = p_.gated ? grad_gate + p_.width : nullptr;
    T* scaled = p_.scaled == nullptr ? nullptr : static_cast<T*>(p_.scaled) + row * p_.width;
    const float scale = p_.row_scale == nullptr ? 1.0f : p_.row_scale[row];
    VecF sums{};
    for (int64_t c = 0; c < p_.width; c += kLanes) {
      const int64_t n = p_.width - c;
      const ValueAndSlope act = activate_with_slope(p_.activation, load_n(gate + c, n));
      const VecF grad = load_n(grad_out + c, n);
      const VecF scaled_grad = scale * grad;
      VecF out = act.value;
      VecF slope = act.slope;
      if (value != nullptr) {
        const VecF factor = load_n(value + c, n);
        out *= factor;
        slope *= factor;
        store_n(grad_value + c, scaled_grad * act.value, n);
      }
      store_n(grad_gate + c, scaled_grad * slope, n);
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
