#include "allocate.h"
#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace moekernels {

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& expert_ids, int64_t num_experts,
                                        const std::optional<int64_t>& capacity,
                                        const std::optional<int64_t>& group_size,
                                        const std::optional<Tensor>& token_order) {
  const Checks check("plan", "expert_ids", expert_ids);
  check.index("expert_ids", expert_ids, 2, "[num_tokens, top_k]");
  const int64_t num_tokens = expert_ids.size(0);
  const int64_t top_k = expert_ids.size(1);
  check.that(num_experts >= 1 && num_experts <= INT32_MAX - 1, "num_experts must be at least 1, got ", num_experts);
  check.that(top_k >= 1, "expert_ids must have at least 1 choice per token, got ", top_k);
  check.that(num_tokens * top_k <= INT32_MAX, "expert_ids must have fewer than 2^31 entries, got ", num_tokens * top_k);
  check.that(!capacity || *capacity >= 1, "capacity must be at least 1, got ", capacity.value_or(0));
  check.that(!group_size || *group_size >= 1, "group_size must be at least 1, got ", group_size.value_or(0));
  check.that(!group_size || capacity, "group_size applies to a capacity, but none was given");
  if (token_order.has_value()) {
    check.index("token_order", *token_order, 1, "[num_tokens]");
    check.shape("token_order", *token_order, {num_tokens}, "[num_tokens]");
  }

  Tensor expert_offsets = new_empty(expert_ids, {num_experts + 1});
  Tensor token_of_row = new_empty(expert_ids, {num_tokens * top_k});
  Tensor row_of_slot = new_empty(expert_ids, {num_tokens, top_k});

  const Tensor dense_ids = dense(expert_ids);
  const std::optional<Tensor> dense_order = dense(token_order);
  PlanParams params{};
  params.expert_ids = dense_ids.const_data_ptr<int32_t>();
  params.token_order = dense_order ? dense_order->const_data_ptr<int32_t>() : nullptr;
  params.expert_offsets = expert_offsets.mutable_data_ptr<int32_t>();
  params.token_of_row = token_of_row.mutable_data_ptr<int32_t>();
  params.row_of_slot = row_of_slot.mutable_data_ptr<int32_t>();
  params.num_tokens = num_tokens;
  params.capacity = capacity.value_or(-1);
  params.group_size = group_size.value_or(num_tokens > 0 ? num_tokens : 1);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = static_cast<int32_t>(top_k);
  launch(params, expert_ids);
  return {expert_offsets, token_of_row, row_of_slot};
}

}  // namespace moekernels
