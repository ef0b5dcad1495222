#include "grouped_gemm.h"

#include "allocate.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

int64_t experts_of(const Checks& check, const Tensor& expert_offsets) {
  check.index("expert_offsets", expert_offsets, 1, "[num_experts + 1]");
  return expert_offsets.size(0) - 1;
}

Tensor grouped_gemm(const Checks& check, const GemmInputs& in) {
  check.rank(in.rows_name, in.rows, 2, "[num_rows, in_features]");
  GroupedGemmParams params{};
  params.dtype = check.floating(in.rows_name, in.rows);
  check.set_activation(params, in.activation, in.gated);
  const int64_t out_features = in.transposed ? in.weight.columns() : in.weight.rows();
  const int64_t in_features = in.transposed ? in.weight.rows() : in.weight.columns();
  check.that(in.rows.size(1) == in_features, in.rows_name, " must have the in_features of ", in.weight.name(), ", ",
             in_features, ", got ", in.rows.size(1));
  if (in.gated && !in.transposed) in.weight.check_gated(check);
  // What the epilogue does not have is an op of its own.
  const bool is_interleaved = params.activation == Activation::kSwiglu && params.swiglu.interleaved;
  const bool lacks_registers =
      in.rows.is_cuda() && (params.activation == Activation::kSwiglu || params.activation == Activation::kRelu2);
  check.that(!in.rows.is_cuda() || !in.transposed || in.bias.is_none(),
             "on CUDA a transposed weight goes with no bias yet");
  if (is_interleaved || lacks_registers || (in.transposed && (params.activation != Activation::kNone || in.gated))) {
    check.that(!in.row_scale.has_value(), "row_scale goes with no ",
               in.transposed    ? "activation or gate of a transposed weight"
               : is_interleaved ? "interleaved gate"
                                : "bounded gate or relu2 on CUDA");
    GemmInputs linear = in;
    linear.activation = "none";
    linear.gated = false;
    return activation(grouped_gemm(check, linear), in.activation, in.gated);
  }
  if (in.token_of_row.has_value()) check.index("token_of_row", *in.token_of_row, 1, "[num_rows]");
  params.num_source_rows = in.rows.size(0);
  params.num_rows = in.token_of_row.has_value() ? in.token_of_row->size(0) : in.rows.size(0);
  check.expert_offsets(in.expert_offsets, in.weight.num_experts(), params.num_rows);
  if (in.row_scale.has_value()) check.float_shape("row_scale", *in.row_scale, {params.num_rows}, "[num_rows]");
  Tensor out = new_empty(in.rows, {params.num_rows, in.gated ? out_features / 2 : out_features});
  if (out.numel() == 0) return out;

  const Tensor source = dense_rows(in.rows);
  const Tensor dense_offsets = dense(in.expert_offsets);
  const std::optional<Tensor> dense_tokens = dense(in.token_of_row);
  const std::optional<Tensor> dense_scale = dense(in.row_scale);
  in.weight.set(params);
  in.bias.set(params);
  params.rows = source.data_ptr();
  params.token_of_row = dense_tokens ? dense_tokens->const_data_ptr<int32_t>() : nullptr;
  params.row_scale = dense_scale ? dense_scale->const_data_ptr<float>() : nullptr;
  params.expert_offsets = dense_offsets.const_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.row_stride = source.stride(0);
  params.out_features = out_features;
  params.in_features = in_features;
  params.transposed = in.transposed;
  params.allow_tf32 = in.allow_tf32;
  params.batch_invariant = in.batch_invariant;
  launch(params, in.rows);
  return out;
}

// `zero_unvisited` is for the gradient.
Tensor grouped_gemm(const Tensor& rows, const std::vector<Tensor>& weight, const Tensor& expert_offsets,
                    const std::vector<Tensor>& bias, const std::string& activation, bool gated,
                    const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row, bool allow_tf32,
                    bool batch_invariant, bool transposed, [[maybe_unused]] bool zero_unvisited) {
  const Checks check("grouped_gemm", "rows", rows);
  check.rank("rows", rows, 2, "[num_rows, in_features]");
  check.floating("rows", rows);
  ExpertWeight experts(
      check, "weight", weight, experts_of(check, expert_offsets),
      transposed ? "[num_experts, in_features, out_features]" : "[num_experts, out_features, in_features]");
  ExpertBias biases(check, "bias", bias, experts, transposed);
  return grouped_gemm(check, {.rows = rows,
                              .weight = experts,
                              .bias = biases,
                              .expert_offsets = expert_offsets,
                              .token_of_row = token_of_row,
                              .row_scale = row_scale,
                              .activation = activation,
                              .gated = gated,
                              .transposed = transposed,
                              .allow_tf32 = allow_tf32,
                              .batch_invariant = batch_invariant});
}

}  // namespace moekernels
