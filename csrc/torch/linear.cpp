#include <vector>

#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// A grouped GEMM of one expert whose offsets need no tensor. input [..., in_features] -> [..., out_features]
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::string& activation, bool batch_invariant) {
  const Checks check("linear", "input", input);
  check.that(input.dim() >= 1, "input must have at least 1 dimension [..., in_features], got 0");
  check.rank("weight", weight, 2, "[out_features, in_features]");
  const int64_t out_features = weight.size(0);
  const int64_t in_features = weight.size(1);

  GroupedGemmParams params{};
  params.dtype = check.floating("input", input);
  check.set_activation(params, activation, false);
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  const int64_t last = input.dim() - 1;
  check.that(input.size(last) == in_features, "input must have the in_features of weight, ", in_features, ", got ",
             input.size(last));
  if (bias.has_value()) {
    check.shape("bias", *bias, {out_features}, "[out_features]");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
  }
  params.num_rows = 1;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < last; ++i) {
    sizes.push_back(input.size(i));
    params.num_rows *= input.size(i);
  }
  sizes.push_back(out_features);
  check.that(params.num_rows <= INT32_MAX, "input must have at most ", INT32_MAX, " rows, got ", params.num_rows);
  Tensor out = moekernels::new_empty(input, sizes);  // and not torch::stable's
  if (out.numel() > 0) {
    const bool is_matrix = input.dim() == 2;
    const Tensor source = is_matrix ? dense_rows(input) : dense(input);
    const Tensor dense_weight = dense_rows(weight);
    const std::optional<Tensor> dense_bias = dense(bias);
    const int32_t offsets[] = {0, static_cast<int32_t>(params.num_rows)};
    params.rows = source.data_ptr();
    params.weight = dense_weight.data_ptr();
    params.bias = dense_bias ? dense_bias->data_ptr() : nullptr;
    params.expert_offsets = offsets;
    params.out = out.mutable_data_ptr();
    params.num_source_rows = params.num_rows;
    params.row_stride = is_matrix ? source.stride(0) : in_features;
    params.weight_row_stride = dense_weight.stride(0);
    params.out_features = out_features;
    params.in_features = in_features;
    params.num_experts = 1;
    params.batch_invariant = batch_invariant;
    launch(params, input);
  }
  return out;
}

}  // namespace moekernels
