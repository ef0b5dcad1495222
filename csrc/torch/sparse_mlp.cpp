#include "checks.h"
#include "grouped_gemm.h"
#include "ops.h"

namespace moekernels {
namespace {

// The chain up-projection (which gathers its rows) -> down-projection -> weighted sum, all of it checked beforehand.
class Layer {
 public:
  Layer(const Tensor& hidden, const Tensor& routing_weights, const Tensor& expert_offsets, const Tensor& token_of_row,
        const Tensor& row_of_slot, const std::vector<Tensor>& up_weight, const std::vector<Tensor>& down_weight,
        const std::vector<Tensor>& up_bias, const std::vector<Tensor>& down_bias, const std::string& activation,
        bool gated, bool allow_tf32, bool batch_invariant)
      : check_("sparse_mlp", "hidden", hidden),
        hidden_(hidden),
        routing_weights_(routing_weights),
        expert_offsets_(expert_offsets),
        token_of_row_(token_of_row),
        row_of_slot_(row_of_slot),
        allow_tf32_(allow_tf32),
        batch_invariant_(batch_invariant),
        num_experts_(check_plan()),
        up_(check_, "up_weight", up_weight, num_experts_, "[num_experts, ffn_size (twice if gated), hidden_size]"),
        down_(check_, "down_weight", down_weight, num_experts_, "[num_experts, hidden_size, ffn_size]"),
        up_bias_(check_, "up_bias", up_bias, up_),
        down_bias_(check_, "down_bias", down_bias, down_) {
    if (gated) up_.check_gated(check_);
    GroupedGemmParams params{};
    check_.set_activation(params, activation, gated);
    check_.that(up_.columns() == hidden.size(1), "hidden must have the hidden_size of up_weight, ", up_.columns(),
                ", got ", hidden.size(1));
    const int64_t ffn_size = gated ? up_.rows() / 2 : up_.rows();
    check_.that(
        down_.num_experts() == up_.num_experts() && down_.rows() == hidden.size(1) && down_.columns() == ffn_size,
        "down_weight must have shape [num_experts, hidden_size, ffn_size] = [", up_.num_experts(), ", ", hidden.size(1),
        ", ", ffn_size, "], got [", down_.num_experts(), ", ", down_.rows(), ", ", down_.columns(), "]");
  }

  Tensor up(const std::string& activation, bool gated) {
    return grouped_gemm(check_, {.rows = hidden_,
                                 .weight = up_,
                                 .bias = up_bias_,
                                 .expert_offsets = expert_offsets_,
                                 .token_of_row = token_of_row_,
                                 .activation = activation,
                                 .gated = gated,
                                 .allow_tf32 = allow_tf32_,
                                 .batch_invariant = batch_invariant_,
                                 .rows_name = "hidden"});
  }

  Tensor down(const Tensor& inner) {
    const Tensor rows = grouped_gemm(check_, {.rows = inner,
                                              .weight = down_,
                                              .bias = down_bias_,
                                              .expert_offsets = expert_offsets_,
                                              .allow_tf32 = allow_tf32_,
                                              .batch_invariant = batch_invariant_});
    return unpermute(rows, row_of_slot_, routing_weights_);
  }

 private:
  int64_t check_plan() const {
    check_.rank("hidden", hidden_, 2, "[num_tokens, hidden_size]");
    check_.floating("hidden", hidden_);
    check_.index("token_of_row", token_of_row_, 1, "[num_rows]");
    check_.index("row_of_slot", row_of_slot_, 2, "[num_tokens, top_k]");
    check_.that(row_of_slot_.size(0) == hidden_.size(0), "row_of_slot must have one row per token, ", hidden_.size(0),
                ", got ", row_of_slot_.size(0));
    check_.float_shape("routing_weights", routing_weights_, {hidden_.size(0), row_of_slot_.size(1)},
                       "[num_tokens, top_k]");
    return experts_of(check_, expert_offsets_);
  }

  const Checks check_;
  const Tensor& hidden_;
  const Tensor& routing_weights_;
  const Tensor& expert_offsets_;
  const Tensor& token_of_row_;
  const Tensor& row_of_slot_;
  const bool allow_tf32_, batch_invariant_;
  const int64_t num_experts_;
  ExpertWeight up_, down_;
  ExpertBias up_bias_, down_bias_;
};

}  // namespace

Tensor sparse_mlp(const Tensor& hidden, const Tensor& routing_weights, const Tensor& expert_offsets,
                  const Tensor& token_of_row, const Tensor& row_of_slot, const std::vector<Tensor>& up_weight,
                  const std::vector<Tensor>& down_weight, const std::vector<Tensor>& up_bias,
                  const std::vector<Tensor>& down_bias, const std::string& activation, bool gated, bool allow_tf32,
                  bool batch_invariant) {
  Layer layer(hidden, routing_weights, expert_offsets, token_of_row, row_of_slot, up_weight, down_weight, up_bias,
              down_bias, activation, gated, allow_tf32, batch_invariant);
  return layer.down(layer.up(activation, gated));
}

// The same, with the up-projection before its activation: all that the gradient needs to know of the rows.
// `zero_unvisited` is for the gradient.
std::tuple<Tensor, Tensor> sparse_mlp_train(const Tensor& hidden, const Tensor& routing_weights,
                                            const Tensor& expert_offsets, const Tensor& token_of_row,
                                            const Tensor& row_of_slot, const std::vector<Tensor>& up_weight,
                                            const std::vector<Tensor>& down_weight, const std::vector<Tensor>& up_bias,
                                            const std::vector<Tensor>& down_bias, const std::string& activation,
                                            bool gated, bool allow_tf32, bool batch_invariant,
                                            [[maybe_unused]] bool zero_unvisited) {
  Layer layer(hidden, routing_weights, expert_offsets, token_of_row, row_of_slot, up_weight, down_weight, up_bias,
              down_bias, activation, gated, allow_tf32, batch_invariant);
  const Tensor linear = layer.up("none", false);
  const Tensor out = layer.down(moekernels::activation(linear, activation, gated));
  return {out, linear};
}

}  // namespace moekernels
