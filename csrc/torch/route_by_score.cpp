#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

// logits [T, E] -> weights [T, K], expert_ids [T, K]
std::tuple<Tensor, Tensor> route_by_score(const Tensor& logits, int64_t top_k, const std::string& score,
                                          const std::optional<Tensor>& selection_bias, int64_t num_groups,
                                          const std::optional<int64_t>& top_groups, bool renormalize, double scale,
                                          const std::optional<Tensor>& mask) {
  const Checks check("route_by_score", "logits", logits);
  check.rank("logits", logits, 2, "[num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  const int64_t kept_groups = top_groups.value_or(num_groups);
  RouteByScoreParams params{};
  params.logits_dtype = check.floating("logits", logits);
  params.score = check.score(score);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX, "logits must have at least 1 expert, got ", num_experts);
  check.that(top_k >= 1 && top_k <= num_experts, "top_k must be between 1 and num_experts, ", num_experts, ", got ",
             top_k);
  if (selection_bias.has_value()) check.float_shape("selection_bias", *selection_bias, {num_experts}, "[num_experts]");
  if (mask.has_value()) {
    check.shape("mask", *mask, {num_tokens}, "[num_tokens]");
    check.dtype("mask", *mask, ScalarType::Bool);
    check.same_device("mask", *mask);
  }
  check.that(num_groups >= 1 && num_experts % num_groups == 0, "num_groups must divide num_experts, ", num_experts,
             ", got ", num_groups);
  check.that(kept_groups >= 1 && kept_groups <= num_groups, "top_groups must be between 1 and num_groups, ", num_groups,
             ", got ", kept_groups);
  const int64_t room = kept_groups * (num_experts / num_groups);
  check.that(top_k <= room, "top_k must be at most the ", room, " experts of ", kept_groups, " groups, got ", top_k);

  Tensor weights = new_empty(logits, {num_tokens, top_k}, ScalarType::Float);
  Tensor expert_ids = new_empty(logits, {num_tokens, top_k}, ScalarType::Int);
  if (num_tokens == 0) return {weights, expert_ids};

  const Tensor rows = dense_rows(logits);
  const std::optional<Tensor> dense_bias = dense(selection_bias);
  const std::optional<Tensor> dense_mask = dense(mask);
  params.logits = rows.data_ptr();
  params.bias = dense_bias ? dense_bias->const_data_ptr<float>() : nullptr;
  params.mask = dense_mask ? static_cast<const uint8_t*>(dense_mask->data_ptr()) : nullptr;
  params.weights = weights.mutable_data_ptr<float>();
  params.expert_ids = expert_ids.mutable_data_ptr<int32_t>();
  params.num_tokens = num_tokens;
  params.logits_stride = rows.stride(0);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  params.num_groups = static_cast<int32_t>(num_groups);
  params.top_groups = static_cast<int32_t>(kept_groups);
  params.renormalize = renormalize;
  params.scale = static_cast<float>(scale);
  launch(params, logits);
  return {weights, expert_ids};
}

}  // namespace moekernels
