#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {
namespace {

struct Groups {
  int64_t count, size;
};

// The tokens of logits [T, E] in `num_groups` equal parts.
Groups groups_of(const Checks& check, const Tensor& logits, int64_t num_groups) {
  const int64_t num_tokens = logits.size(0);
  check.that(num_groups >= 1 && num_tokens % num_groups == 0, "num_groups must divide the number of tokens, ",
             num_tokens, ", got ", num_groups);
  return {num_groups, num_tokens / num_groups};
}

Tensor new_floats(const Tensor& on, std::initializer_list<int64_t> sizes) {
  return new_empty(on, sizes, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> router_stats(const Tensor& logits, int64_t num_groups, int64_t top_k,
                                                const std::optional<Tensor>& mask) {
  const Checks check("router_stats", "logits", logits);
  check.rank("logits", logits, 2, "[num_tokens, num_experts]");
  const int64_t num_experts = logits.size(1);
  const Groups groups = groups_of(check, logits, num_groups);

  RouterStatsParams params{};
  params.logits_dtype = check.floating("logits", logits);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX, "logits must have at least 1 expert, got ", num_experts);
  check.that(top_k >= 1 && top_k <= num_experts, "top_k must be between 1 and the number of experts, ", num_experts,
             ", got ", top_k);
  if (mask.has_value()) check.float_shape("mask", *mask, {logits.size(0)}, "[num_tokens]");
  Tensor counts = new_floats(logits, {groups.count, num_experts});
  Tensor prob_sums = new_floats(logits, {groups.count, num_experts});
  Tensor z_sums = new_floats(logits, {groups.count});
  if (groups.size == 0) {
    for (Tensor* sums : {&counts, &prob_sums, &z_sums}) torch::stable::zero_(*sums);
    return {counts, prob_sums, z_sums};
  }

  const Tensor logits_rows = dense_rows(logits);
  const std::optional<Tensor> dense_mask = dense(mask);
  params.logits = logits_rows.data_ptr();
  params.mask = dense_mask ? dense_mask->const_data_ptr<float>() : nullptr;
  params.counts = counts.mutable_data_ptr<float>();
  params.prob_sums = prob_sums.mutable_data_ptr<float>();
  params.z_sums = z_sums.mutable_data_ptr<float>();
  params.num_groups = groups.count;
  params.group_size = groups.size;
  params.logits_stride = logits_rows.stride(0);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  launch(params, logits);
  return {counts, prob_sums, z_sums};
}

Tensor router_stats_grad(const Tensor& grad_prob_sums, const Tensor& grad_z_sums, const Tensor& logits,
                         const std::optional<Tensor>& mask) {
  const Checks check("router_stats_grad", "logits", logits);
  check.rank("logits", logits, 2, "[num_tokens, num_experts]");
  check.rank("grad_prob_sums", grad_prob_sums, 2, "[num_groups, num_experts]");
  const Groups groups = groups_of(check, logits, grad_prob_sums.size(0));

  RouterStatsGradParams params{};
  params.logits_dtype = check.floating("logits", logits);
  check.that(logits.size(1) <= INT32_MAX, "logits must have fewer than 2^31 experts, got ", logits.size(1));
  check.float_shape("grad_prob_sums", grad_prob_sums, {groups.count, logits.size(1)}, "[num_groups, num_experts]");
  check.float_shape("grad_z_sums", grad_z_sums, {groups.count}, "[num_groups]");
  if (mask.has_value()) check.float_shape("mask", *mask, {logits.size(0)}, "[num_tokens]");
  Tensor grad_logits = moekernels::new_empty(logits, {logits.size(0), logits.size(1)});
  if (grad_logits.numel() == 0) return grad_logits;

  const Tensor logits_rows = dense_rows(logits);
  const std::optional<Tensor> dense_mask = dense(mask);
  const Tensor dense_probs = dense(grad_prob_sums);
  const Tensor dense_z = dense(grad_z_sums);
  params.logits = logits_rows.data_ptr();
  params.mask = dense_mask ? dense_mask->const_data_ptr<float>() : nullptr;
  params.grad_prob_sums = dense_probs.const_data_ptr<float>();
  params.grad_z_sums = dense_z.const_data_ptr<float>();
  params.grad_logits = grad_logits.mutable_data_ptr();
  params.num_groups = groups.count;
  params.group_size = groups.size;
  params.logits_stride = logits_rows.stride(0);
  params.num_experts = static_cast<int32_t>(logits.size(1));
  launch(params, logits);
  return grad_logits;
}

}  // namespace moekernels
