#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// scores [T, E] -> weights [T, K], expert_ids [T, K]
std::tuple<Tensor, Tensor> choose(const Tensor& scores, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& mask, int64_t top_k, int64_t num_groups,
                                  int64_t top_groups, bool renormalize, double scale) {
  const Checks check("choose", "scores", scores);
  check.rank("scores", scores, 2, "[num_tokens, num_experts]");
  check.dtype("scores", scores, ScalarType::Float);
  const int64_t num_tokens = scores.size(0);
  const int64_t num_experts = scores.size(1);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX, "scores must have at least 1 expert, got ", num_experts);
  check.that(num_groups >= 1 && num_experts % num_groups == 0, "num_groups must divide num_experts, ", num_experts,
             ", got ", num_groups);
  check.that(top_groups >= 1 && top_groups <= num_groups, "top_groups must be between 1 and num_groups, ", num_groups,
             ", got ", top_groups);
  check.that(top_k >= 1 && top_k <= num_experts / num_groups * top_groups, "top_k must be between 1 and ",
             num_experts / num_groups * top_groups, ", got ", top_k);
  if (bias.has_value()) check.float_shape("bias", *bias, {num_experts}, "[num_experts]");
  if (mask.has_value()) {
    check.shape("mask", *mask, {num_tokens}, "[num_tokens]");
    check.dtype("mask", *mask, ScalarType::Bool);
    check.same_device("mask", *mask);
  }

  Tensor weights = new_empty(scores, {num_tokens, top_k});
  Tensor expert_ids = new_empty(scores, {num_tokens, top_k}, ScalarType::Int);
  if (num_tokens == 0) return {weights, expert_ids};

  const Tensor rows = dense_rows(scores);
  const std::optional<Tensor> dense_bias = dense(bias);
  const std::optional<Tensor> dense_mask = dense(mask);
  ChooseParams params{};
  params.scores = rows.const_data_ptr<float>();
  params.bias = dense_bias ? dense_bias->const_data_ptr<float>() : nullptr;
  params.mask = dense_mask ? static_cast<const uint8_t*>(dense_mask->data_ptr()) : nullptr;
  params.weights = weights.mutable_data_ptr<float>();
  params.expert_ids = expert_ids.mutable_data_ptr<int32_t>();
  params.num_tokens = num_tokens;
  params.scores_stride = rows.stride(0);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  params.num_groups = static_cast<int32_t>(num_groups);
  params.top_groups = static_cast<int32_t>(top_groups);
  params.renormalize = renormalize;
  params.scale = static_cast<float>(scale);
  launch(params, scores);
  return {weights, expert_ids};
}

}  // namespace moekernels
