#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

std::tuple<Tensor, Tensor> grouped_weight_grad(const Tensor& grad_rows, const Tensor& rows,
                                               const Tensor& expert_offsets,
                                               const std::optional<Tensor>& grad_token_of_row,
                                               const std::optional<Tensor>& token_of_row,
                                               const std::optional<Tensor>& bias_scale, bool need_bias,
                                               bool allow_tf32) {
  const Checks check("grouped_weight_grad", "grad_rows", grad_rows);
  check.rank("grad_rows", grad_rows, 2, "[num_rows, out_features]");
  check.rank("rows", rows, 2, "[num_rows, in_features]");

  GroupedWeightGradParams params{};
  params.dtype = check.floating("grad_rows", grad_rows);
  check.same_dtype("rows", rows);
  check.same_device("rows", rows);
  if (grad_token_of_row.has_value()) check.index("grad_token_of_row", *grad_token_of_row, 1, "[num_rows]");
  if (token_of_row.has_value()) check.index("token_of_row", *token_of_row, 1, "[num_rows]");
  params.num_source_grad_rows = grad_rows.size(0);
  params.num_source_rows = rows.size(0);
  params.num_rows = grad_token_of_row.has_value() ? grad_token_of_row->size(0) : grad_rows.size(0);
  const int64_t num_input_rows = token_of_row.has_value() ? token_of_row->size(0) : rows.size(0);
  check.that(num_input_rows == params.num_rows, token_of_row.has_value() ? "token_of_row" : "rows",
             " must have as many rows as the gradient, ", params.num_rows, ", got ", num_input_rows);
  check.index("expert_offsets", expert_offsets, 1, "[num_experts + 1]");
  const int64_t num_experts = expert_offsets.size(0) - 1;
  check.that(num_experts >= 1 && num_experts <= INT32_MAX - 1,
             "expert_offsets must have at least 2 elements, for 1 expert, got ", expert_offsets.size(0));
  check.expert_offsets(expert_offsets, num_experts, params.num_rows);
  if (bias_scale.has_value()) {
    check.shape("bias_scale", *bias_scale, {params.num_rows}, "[num_rows]");
    check.dtype("bias_scale", *bias_scale, ScalarType::Float);
    check.same_device("bias_scale", *bias_scale);
  }
  params.out_features = grad_rows.size(1);
  params.in_features = rows.size(1);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.allow_tf32 = allow_tf32;
  Tensor grad_weight = new_empty(grad_rows, {num_experts, params.out_features, params.in_features});
  Tensor grad_bias = need_bias ? new_empty(grad_rows, {num_experts, params.out_features}) : new_empty(grad_rows, {0});
  if (grad_weight.numel() == 0 && grad_bias.numel() == 0) return {grad_weight, grad_bias};

  const Tensor source_grads = dense_rows(grad_rows);
  const Tensor source_rows = dense_rows(rows);
  const Tensor dense_offsets = dense(expert_offsets);
  const std::optional<Tensor> dense_grad_tokens = dense(grad_token_of_row);
  const std::optional<Tensor> dense_tokens = dense(token_of_row);
  const std::optional<Tensor> dense_scale = dense(bias_scale);
  params.grad_rows = source_grads.data_ptr();
  params.rows = source_rows.data_ptr();
  params.grad_token_of_row = dense_grad_tokens ? dense_grad_tokens->const_data_ptr<int32_t>() : nullptr;
  params.token_of_row = dense_tokens ? dense_tokens->const_data_ptr<int32_t>() : nullptr;
  params.bias_scale = dense_scale ? dense_scale->const_data_ptr<float>() : nullptr;
  params.expert_offsets = dense_offsets.const_data_ptr<int32_t>();
  params.grad_weight = grad_weight.numel() > 0 ? grad_weight.mutable_data_ptr() : nullptr;
  params.grad_bias = grad_bias.numel() > 0 ? grad_bias.mutable_data_ptr() : nullptr;
  params.grad_row_stride = source_grads.stride(0);
  params.row_stride = source_rows.stride(0);
  launch(params, grad_rows);
  return {grad_weight, grad_bias};
}

}  // namespace moekernels
