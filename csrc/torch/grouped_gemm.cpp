#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

Tensor grouped_gemm(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                    const std::optional<Tensor>& bias, const std::string& activation, bool gated,
                    const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row, bool allow_tf32,
                    bool batch_invariant, bool transposed) {
  const Checks check("grouped_gemm", "rows", rows);
  check.rank("rows", rows, 2, "[num_rows, in_features]");
  check.rank("weight", weight, 3,
             transposed ? "[num_experts, in_features, out_features]" : "[num_experts, out_features, in_features]");
  const int64_t num_experts = weight.size(0);
  const int64_t out_features = weight.size(transposed ? 2 : 1);
  const int64_t in_features = weight.size(transposed ? 1 : 2);

  GroupedGemmParams params{};
  params.dtype = check.floating("rows", rows);
  params.activation = check.activation(activation);
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX - 1, "weight must have at least 1 expert, got ", num_experts);
  check.that(rows.size(1) == in_features, "rows must have the in_features of weight, ", in_features, ", got ",
             rows.size(1));
  check.that(!gated || out_features % 2 == 0,
             "a gated weight holds gate and value, so its out_features must be even, got ", out_features);
  check.that(!transposed || (!bias.has_value() && activation == "none" && !gated),
             "a transposed weight goes with no bias, no activation and no gate");
  if (token_of_row.has_value()) check.index("token_of_row", *token_of_row, 1, "[num_rows]");
  params.num_source_rows = rows.size(0);
  params.num_rows = token_of_row.has_value() ? token_of_row->size(0) : rows.size(0);
  check.expert_offsets(expert_offsets, num_experts, params.num_rows);
  if (bias.has_value()) {
    check.shape("bias", *bias, {num_experts, out_features}, "[num_experts, out_features]");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
  }
  if (row_scale.has_value()) {
    check.shape("row_scale", *row_scale, {params.num_rows}, "[num_rows]");
    check.dtype("row_scale", *row_scale, ScalarType::Float);
    check.same_device("row_scale", *row_scale);
  }
  Tensor out = new_empty(rows, {params.num_rows, gated ? out_features / 2 : out_features});
  if (out.numel() == 0) return out;

  const Tensor source = dense_rows(rows);
  const Tensor dense_weight = dense_rows(weight);
  const Tensor dense_offsets = dense(expert_offsets);
  const std::optional<Tensor> dense_tokens = dense(token_of_row);
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) dense_bias = dense_rows(*bias);
  const std::optional<Tensor> dense_scale = dense(row_scale);
  params.rows = source.data_ptr();
  params.token_of_row = dense_tokens ? dense_tokens->const_data_ptr<int32_t>() : nullptr;
  params.weight = dense_weight.data_ptr();
  params.bias = dense_bias ? dense_bias->data_ptr() : nullptr;
  params.row_scale = dense_scale ? dense_scale->const_data_ptr<float>() : nullptr;
  params.expert_offsets = dense_offsets.const_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.row_stride = source.stride(0);
  params.weight_expert_stride = dense_weight.stride(0);
  params.weight_row_stride = dense_weight.stride(1);
  params.bias_stride = dense_bias ? dense_bias->stride(0) : 0;
  params.out_features = out_features;
  params.in_features = in_features;
  params.num_experts = static_cast<int32_t>(num_experts);
  params.gated = gated;
  params.transposed = transposed;
  params.allow_tf32 = allow_tf32;
  params.batch_invariant = batch_invariant;
  launch(params, rows);
  return out;
}

}  // namespace moekernels
