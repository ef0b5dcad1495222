#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, const std::string& scoring, bool renormalize,
                                 const std::optional<ScalarType>& probs_dtype, double eps,
                                 const std::optional<Tensor>& noise, const std::optional<Tensor>& mask) {
  const Checks check("route", "logits", logits);
  check.rank("logits", logits, 2, "[num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);

  RouteParams params{};
  params.logits_dtype = check.floating("logits", logits);
  params.scoring = check.scoring(scoring);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX, "logits must have at least 1 expert, got ", num_experts);
  check.that(top_k >= 1 && top_k <= num_experts, "top_k must be between 1 and the number of experts, ", num_experts,
             ", got ", top_k);
  check.that(params.scoring == Scoring::kSoftmax || top_k == 2, "scoring '", scoring, "' chooses 2 experts, got top_k ",
             top_k);
  params.probs_dtype = check.probs_dtype(probs_dtype, params.scoring);
  if (noise.has_value()) {
    check.that(params.scoring != Scoring::kSoftmax, "noise does not apply to scoring 'softmax'");
    if (params.scoring == Scoring::kSparsemixer) {
      check.shape("noise", *noise, {2, num_tokens, num_experts}, "[2, num_tokens, num_experts]");
    } else {
      check.shape("noise", *noise, {num_tokens, num_experts}, "[num_tokens, num_experts]");
    }
    check.dtype("noise", *noise, ScalarType::Float);
    check.same_device("noise", *noise);
  }
  if (mask.has_value()) {
    check.shape("mask", *mask, {num_tokens}, "[num_tokens]");
    check.dtype("mask", *mask, ScalarType::Bool);
    check.same_device("mask", *mask);
  }

  Tensor weights = new_empty(logits, {num_tokens, top_k}, ScalarType::Float);
  Tensor expert_ids = new_empty(logits, {num_tokens, top_k}, ScalarType::Int);
  if (num_tokens == 0) return {weights, expert_ids};

  const Tensor logits_rows = dense_rows(logits);
  const std::optional<Tensor> dense_noise = dense(noise);
  const std::optional<Tensor> dense_mask = dense(mask);
  params.logits = logits_rows.data_ptr();
  params.noise = dense_noise ? dense_noise->const_data_ptr<float>() : nullptr;
  params.mask = dense_mask ? static_cast<const uint8_t*>(dense_mask->data_ptr()) : nullptr;
  params.weights = weights.mutable_data_ptr<float>();
  params.expert_ids = expert_ids.mutable_data_ptr<int32_t>();
  params.num_tokens = num_tokens;
  params.logits_stride = logits_rows.stride(0);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  params.renormalize = renormalize;
  params.eps = static_cast<float>(eps);
  launch(params, logits);
  return {weights, expert_ids};
}

Tensor route_grad(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                  const std::string& scoring, bool renormalize, const std::optional<ScalarType>& probs_dtype,
                  double eps) {
  const Checks check("route_grad", "logits", logits);
  check.rank("logits", logits, 2, "[num_tokens, num_experts]");
  check.index("expert_ids", expert_ids, 2, "[num_tokens, top_k]");

  RouteGradParams params{};
  params.logits_dtype = check.floating("logits", logits);
  params.num_tokens = logits.size(0);
  check.that(logits.size(1) <= INT32_MAX, "logits must have fewer than 2^31 experts, got ", logits.size(1));
  params.num_experts = static_cast<int32_t>(logits.size(1));
  params.top_k = static_cast<int32_t>(expert_ids.size(1));
  params.scoring = check.scoring(scoring);
  params.probs_dtype = check.probs_dtype(probs_dtype, params.scoring);
  params.renormalize = renormalize;
  params.eps = static_cast<float>(eps);
  check.shape("expert_ids", expert_ids, {params.num_tokens, params.top_k}, "[num_tokens, top_k]");
  check.float_shape("grad_weights", grad_weights, {params.num_tokens, params.top_k}, "[num_tokens, top_k]");
  check.that(params.scoring == Scoring::kSoftmax || params.top_k == 2, "scoring '", scoring,
             "' chooses 2 experts, got top_k ", params.top_k);
  Tensor grad_logits = moekernels::new_empty(logits, {params.num_tokens, params.num_experts});
  if (grad_logits.numel() == 0) return grad_logits;

  const Tensor logits_rows = dense_rows(logits);
  const Tensor dense_ids = dense(expert_ids);
  const Tensor dense_grads = dense(grad_weights);
  params.logits = logits_rows.data_ptr();
  params.expert_ids = dense_ids.const_data_ptr<int32_t>();
  params.grad_weights = dense_grads.const_data_ptr<float>();
  params.grad_logits = grad_logits.mutable_data_ptr();
  params.logits_stride = logits_rows.stride(0);
  launch(params, logits);
  return grad_logits;
}

}  // namespace moekernels
