#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

Tensor unpermute(const Tensor& rows, const Tensor& row_of_slot, const std::optional<Tensor>& routing_weights) {
  const Checks check("unpermute", "rows", rows);
  check.rank("rows", rows, 2, "[num_rows, hidden_size]");
  check.index("row_of_slot", row_of_slot, 2, "[num_tokens, top_k]");

  UnpermuteParams params{};
  params.dtype = check.floating("rows", rows);
  params.num_tokens = row_of_slot.size(0);
  params.num_rows = rows.size(0);
  params.hidden_size = rows.size(1);
  params.top_k = static_cast<int32_t>(row_of_slot.size(1));
  if (routing_weights.has_value()) {
    check.shape("routing_weights", *routing_weights, {params.num_tokens, params.top_k}, "[num_tokens, top_k]");
    check.dtype("routing_weights", *routing_weights, ScalarType::Float);
    check.same_device("routing_weights", *routing_weights);
  }
  Tensor out = new_empty(rows, {params.num_tokens, params.hidden_size});
  if (out.numel() == 0) return out;

  const Tensor dense_rows_ = dense_rows(rows);
  const Tensor dense_slots = dense(row_of_slot);
  const std::optional<Tensor> dense_weights = dense(routing_weights);
  params.rows = dense_rows_.data_ptr();
  params.row_of_slot = dense_slots.const_data_ptr<int32_t>();
  params.weights = dense_weights ? dense_weights->const_data_ptr<float>() : nullptr;
  params.out = out.mutable_data_ptr();
  params.row_stride = dense_rows_.stride(0);
  launch(params, rows);
  return out;
}

// A result that is not asked for, or without `rows` cannot be had, has no rows.
std::tuple<Tensor, Tensor> unpermute_grad(const Tensor& grad_out, const std::optional<Tensor>& rows,
                                          const Tensor& row_of_slot, const Tensor& token_of_row,
                                          const std::optional<Tensor>& routing_weights, bool with_grad_rows) {
  const Checks check("unpermute_grad", "grad_out", grad_out);
  check.rank("grad_out", grad_out, 2, "[num_tokens, hidden_size]");
  check.index("row_of_slot", row_of_slot, 2, "[num_tokens, top_k]");
  check.index("token_of_row", token_of_row, 1, "[num_rows]");

  UnpermuteGradParams params{};
  params.dtype = check.floating("grad_out", grad_out);
  params.num_tokens = grad_out.size(0);
  params.num_rows = token_of_row.size(0);
  params.hidden_size = grad_out.size(1);
  params.top_k = static_cast<int32_t>(row_of_slot.size(1));
  check.shape("row_of_slot", row_of_slot, {params.num_tokens, params.top_k}, "[num_tokens, top_k]");
  if (rows.has_value()) {
    check.shape("rows", *rows, {params.num_rows, params.hidden_size}, "[num_rows, hidden_size]");
    check.same_dtype("rows", *rows);
    check.same_device("rows", *rows);
  }
  if (routing_weights.has_value()) {
    check.float_shape("routing_weights", *routing_weights, {params.num_tokens, params.top_k}, "[num_tokens, top_k]");
  }
  Tensor grad_rows = new_empty(grad_out, {with_grad_rows ? params.num_rows : 0, params.hidden_size});
  Tensor grad_weights =
      new_empty(grad_out, {rows.has_value() ? params.num_tokens : 0, params.top_k}, ScalarType::Float);
  if (grad_rows.numel() == 0 && grad_weights.numel() == 0) return {grad_rows, grad_weights};

  const Tensor dense_grad = dense_rows(grad_out);
  const std::optional<Tensor> dense_rows_ = dense_rows(rows);
  const Tensor dense_slots = dense(row_of_slot);
  const Tensor dense_tokens = dense(token_of_row);
  const std::optional<Tensor> dense_weights = dense(routing_weights);
  params.grad_out = dense_grad.data_ptr();
  params.rows = dense_rows_ ? dense_rows_->data_ptr() : nullptr;
  params.row_of_slot = dense_slots.const_data_ptr<int32_t>();
  params.token_of_row = dense_tokens.const_data_ptr<int32_t>();
  params.weights = dense_weights ? dense_weights->const_data_ptr<float>() : nullptr;
  params.grad_rows = grad_rows.numel() > 0 ? grad_rows.mutable_data_ptr() : nullptr;
  params.grad_weights = grad_weights.numel() > 0 ? grad_weights.mutable_data_ptr<float>() : nullptr;
  params.grad_stride = dense_grad.stride(0);
  params.row_stride = dense_rows_ ? dense_rows_->stride(0) : 0;
  launch(params, grad_out);
  return {grad_rows, grad_weights};
}

}  // namespace moekernels
