#include "checks.h"
#include "ops.h"

namespace moekernels {
namespace {

void check_layer(const char* op, const Tensor& hidden, const Tensor& row_of_slot, const Tensor& up_weight,
                 const Tensor& down_weight, bool gated) {
  const Checks check(op, "hidden", hidden);
  check.rank("hidden", hidden, 2, "[num_tokens, hidden_size]");
  check.rank("up_weight", up_weight, 3, "[num_experts, ffn_size (twice if gated), hidden_size]");
  check.rank("down_weight", down_weight, 3, "[num_experts, hidden_size, ffn_size]");
  check.rank("row_of_slot", row_of_slot, 2, "[num_tokens, top_k]");
  check.that(row_of_slot.size(0) == hidden.size(0), "row_of_slot must have one row per token, ", hidden.size(0),
             ", got ", row_of_slot.size(0));
  check.that(!gated || up_weight.size(1) % 2 == 0,
             "a gated up_weight holds gate and value, so its second size must be even, got ", up_weight.size(1));
  check.shape("down_weight", down_weight,
              {up_weight.size(0), hidden.size(1), gated ? up_weight.size(1) / 2 : up_weight.size(1)},
              "[num_experts, hidden_size, ffn_size]");
}

}  // namespace

// The chain up-projection (which gathers its rows) -> down-projection -> weighted sum.
Tensor sparse_mlp(const Tensor& hidden, const Tensor& expert_weights, const Tensor& expert_offsets,
                  const Tensor& token_of_row, const Tensor& row_of_slot, const Tensor& up_weight,
                  const Tensor& down_weight, const std::optional<Tensor>& up_bias,
                  const std::optional<Tensor>& down_bias, const std::string& activation, bool gated, bool allow_tf32,
                  bool batch_invariant) {
  check_layer("sparse_mlp", hidden, row_of_slot, up_weight, down_weight, gated);
  const Tensor inner = grouped_gemm(hidden, up_weight, expert_offsets, up_bias, activation, gated, std::nullopt,
                                    token_of_row, allow_tf32, batch_invariant, false);
  const Tensor rows = grouped_gemm(inner, down_weight, expert_offsets, down_bias, "none", false, std::nullopt,
                                   std::nullopt, allow_tf32, batch_invariant, false);
  return unpermute(rows, row_of_slot, expert_weights);
}

// The same, with the up-projection before its activation: all that the gradient needs to know of the rows.
std::tuple<Tensor, Tensor> sparse_mlp_train(const Tensor& hidden, const Tensor& expert_weights,
                                            const Tensor& expert_offsets, const Tensor& token_of_row,
                                            const Tensor& row_of_slot, const Tensor& up_weight,
                                            const Tensor& down_weight, const std::optional<Tensor>& up_bias,
                                            const std::optional<Tensor>& down_bias, const std::string& activation,
                                            bool gated, bool allow_tf32, bool batch_invariant) {
  check_layer("sparse_mlp_train", hidden, row_of_slot, up_weight, down_weight, gated);
  const Tensor linear = grouped_gemm(hidden, up_weight, expert_offsets, up_bias, "none", false, std::nullopt,
                                     token_of_row, allow_tf32, batch_invariant, false);
  const Tensor inner = moekernels::activation(linear, activation, gated);
  const Tensor rows = grouped_gemm(inner, down_weight, expert_offsets, down_bias, "none", false, std::nullopt,
                                   std::nullopt, allow_tf32, batch_invariant, false);
  return {unpermute(rows, row_of_slot, expert_weights), linear};
}

}  // namespace moekernels
