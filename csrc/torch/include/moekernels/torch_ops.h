// The ops of moekernels in a LibTorch program. Shapes, dtypes and errors are those of the Python functions of the same
// names (moekernels.ops); arguments that are left out take the defaults of the op's schema.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <tuple>
#include <vector>

namespace moekernels::torch_ops {

// Any op by its name, with the first of its arguments; returns its outputs. Throws c10::Error for an unknown op.
template <typename... Arguments>
torch::jit::Stack call(const char* name, Arguments&&... arguments) {
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack;
  torch::jit::push(stack, std::forward<Arguments>(arguments)...);
  const auto& declared = op.schema().arguments();
  for (size_t i = stack.size(); i < declared.size(); ++i) {
    TORCH_CHECK(declared[i].default_value().has_value(), name, ": argument ", declared[i].name(), " is missing");
    stack.push_back(*declared[i].default_value());
  }
  op.callBoxed(&stack);
  return stack;
}

struct Routing {
  at::Tensor weights;     // [T, K] float32
  at::Tensor expert_ids;  // [T, K] int32
};

struct Plan {
  at::Tensor expert_offsets;  // [E + 1] int32
  at::Tensor token_of_row;    // [T * K] int32
  at::Tensor row_of_slot;     // [T, K] int32
};

// logits [T, E]
inline Routing route(const at::Tensor& logits, int64_t top_k, const std::string& scoring = "softmax",
                     bool renormalize = false) {
  const auto out = call("moekernels::route", logits, top_k, scoring, renormalize);
  return {out[0].toTensor(), out[1].toTensor()};
}

// expert_ids [T, K]; at most `capacity` rows per expert and group of `group_size` tokens
inline Plan plan(const at::Tensor& expert_ids, int64_t num_experts, std::optional<int64_t> capacity = std::nullopt,
                 std::optional<int64_t> group_size = std::nullopt) {
  const auto out = call("moekernels::plan", expert_ids, num_experts, capacity, group_size);
  return {out[0].toTensor(), out[1].toTensor(), out[2].toTensor()};
}

// hidden [T, H], up_weight [E, 2F, H] if gated else [E, F, H], down_weight [E, H, F] -> [T, H]
inline at::Tensor sparse_mlp(const at::Tensor& hidden, const at::Tensor& routing_weights, const Plan& plan,
                             const at::Tensor& up_weight, const at::Tensor& down_weight,
                             const std::optional<at::Tensor>& up_bias = std::nullopt,
                             const std::optional<at::Tensor>& down_bias = std::nullopt,
                             const std::string& activation = "silu", bool gated = true) {
  using List = std::vector<at::Tensor>;
  const auto out = call("moekernels::sparse_mlp", hidden, routing_weights, plan.expert_offsets, plan.token_of_row,
                        plan.row_of_slot, List{up_weight}, List{down_weight}, up_bias ? List{*up_bias} : List{},
                        down_bias ? List{*down_bias} : List{}, activation, gated);
  return out[0].toTensor();
}

}  // namespace moekernels::torch_ops
