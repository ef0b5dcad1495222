#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {
namespace {

// F of linear [N, 2F] or [N, F].
int64_t width_of(const Checks& check, const Tensor& linear, bool gated) {
  check.rank("linear", linear, 2, "[num_rows, width (twice if gated)]");
  check.that(!gated || linear.size(1) % 2 == 0,
             "a gated linear holds gate and value, so its second size must be even, got ", linear.size(1));
  return gated ? linear.size(1) / 2 : linear.size(1);
}

}  // namespace

Tensor activation(const Tensor& linear, const std::string& activation, bool gated) {
  const Checks check("activation", "linear", linear);
  ActivationParams params{};
  params.width = width_of(check, linear, gated);
  params.dtype = check.floating("linear", linear);
  check.set_activation(params, activation, gated);
  params.num_rows = linear.size(0);
  Tensor out = new_empty(linear, {params.num_rows, params.width});
  if (out.numel() == 0) return out;

  const Tensor dense_linear = dense(linear);
  params.linear = dense_linear.data_ptr();
  params.out = out.mutable_data_ptr();
  launch(params, linear);
  return out;
}

// A result that is not asked for has no rows.
std::tuple<Tensor, Tensor, Tensor> activation_grad(const Tensor& grad_out, const Tensor& linear,
                                                   const std::string& activation, bool gated,
                                                   const std::optional<Tensor>& row_scale,
                                                   const std::optional<Tensor>& expert_offsets, bool with_scaled,
                                                   bool with_grad_scale) {
  const Checks check("activation_grad", "linear", linear);
  ActivationGradParams params{};
  params.width = width_of(check, linear, gated);
  params.dtype = check.floating("linear", linear);
  check.set_activation(params, activation, gated);
  params.num_rows = linear.size(0);
  check.shape("grad_out", grad_out, {params.num_rows, params.width}, "[num_rows, width]");
  check.same_dtype("grad_out", grad_out);
  check.same_device("grad_out", grad_out);
  if (row_scale.has_value()) check.float_shape("row_scale", *row_scale, {params.num_rows}, "[num_rows]");
  if (expert_offsets.has_value()) {
    check.rank("expert_offsets", *expert_offsets, 1, "[num_experts + 1]");
    check.that(expert_offsets->size(0) >= 2, "expert_offsets must have at least 2 entries, got ",
               expert_offsets->size(0));
    check.expert_offsets(*expert_offsets, expert_offsets->size(0) - 1, params.num_rows);
  }
  Tensor grad_linear = new_empty(linear, {params.num_rows, linear.size(1)});
  Tensor scaled = new_empty(linear, {with_scaled ? params.num_rows : 0, params.width});
  Tensor grad_scale = new_empty(linear, {with_grad_scale ? params.num_rows : 0}, ScalarType::Float);
  if (params.num_rows == 0) return {grad_linear, scaled, grad_scale};

  const Tensor dense_grad = dense(grad_out);
  const Tensor dense_linear = dense(linear);
  const std::optional<Tensor> dense_scale = dense(row_scale);
  const std::optional<Tensor> dense_offsets = dense(expert_offsets);
  params.grad_out = dense_grad.data_ptr();
  params.linear = dense_linear.data_ptr();
  params.row_scale = dense_scale ? dense_scale->const_data_ptr<float>() : nullptr;
  params.expert_offsets = dense_offsets ? dense_offsets->const_data_ptr<int32_t>() : nullptr;
  params.grad_linear = grad_linear.mutable_data_ptr();
  params.scaled = with_scaled ? scaled.mutable_data_ptr() : nullptr;
  params.grad_scale = with_grad_scale ? grad_scale.mutable_data_ptr<float>() : nullptr;
  params.num_experts = expert_offsets ? static_cast<int32_t>(expert_offsets->size(0) - 1) : 0;
  launch(params, linear);
  return {grad_linear, scaled, grad_scale};
}

}  // namespace moekernels
