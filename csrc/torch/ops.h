// The ops as functions on tensors: check, allocate, fill the parameter struct, launch on the tensors' device. Weights
// and biases of experts come as lists (expert_weight.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace moekernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, const std::string& scoring, bool renormalize,
                                 const std::optional<ScalarType>& probs_dtype, double eps,
                                 const std::optional<Tensor>& noise, const std::optional<Tensor>& mask);

std::tuple<Tensor, Tensor> route_by_score(const Tensor& logits, int64_t top_k, const std::string& score,
                                          const std::optional<Tensor>& selection_bias, int64_t num_groups,
                                          const std::optional<int64_t>& top_groups, bool renormalize, double scale,
                                          const std::optional<Tensor>& mask);

Tensor transpose(const Tensor& matrix);

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& expert_ids, int64_t num_experts,
                                        const std::optional<int64_t>& capacity,
                                        const std::optional<int64_t>& group_size,
                                        const std::optional<Tensor>& token_order);

Tensor quantized_gemm(const Tensor& rows, const Tensor& codes, const Tensor& scales, const std::vector<Tensor>& tables,
                      const std::string& order, int64_t group, double unit, int64_t out_features,
                      const Tensor& expert_offsets, const std::optional<Tensor>& bias, const std::string& activation,
                      bool gated, const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row,
                      bool batch_invariant, bool int8_rows, double int8_threshold, bool transposed);

Tensor permute(const Tensor& hidden, const Tensor& token_of_row, const std::optional<Tensor>& row_of_slot);

Tensor grouped_gemm(const Tensor& rows, const std::vector<Tensor>& weight, const Tensor& expert_offsets,
                    const std::vector<Tensor>& bias, const std::string& activation, bool gated,
                    const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row, bool allow_tf32,
                    bool batch_invariant, bool transposed, bool zero_unvisited);

std::tuple<Tensor, Tensor> grouped_weight_grad(const Tensor& grad_rows, const Tensor& rows,
                                               const Tensor& expert_offsets,
                                               const std::optional<Tensor>& grad_token_of_row,
                                               const std::optional<Tensor>& token_of_row,
                                               const std::optional<Tensor>& bias_scale, bool need_bias,
                                               bool allow_tf32);

Tensor unpermute(const Tensor& rows, const Tensor& row_of_slot, const std::optional<Tensor>& routing_weights);

Tensor sparse_mlp(const Tensor& hidden, const Tensor& routing_weights, const Tensor& expert_offsets,
                  const Tensor& token_of_row, const Tensor& row_of_slot, const std::vector<Tensor>& up_weight,
                  const std::vector<Tensor>& down_weight, const std::vector<Tensor>& up_bias,
                  const std::vector<Tensor>& down_bias, const std::string& activation, bool gated, bool allow_tf32,
                  bool batch_invariant);

Tensor activation(const Tensor& linear, const std::string& activation, bool gated);

std::tuple<Tensor, Tensor, Tensor> router_stats(const Tensor& logits, int64_t num_groups, int64_t top_k,
                                                const std::optional<Tensor>& mask);

// --- what else a decoding step needs, on the CPU ---

Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps);

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::string& activation, bool batch_invariant);

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                 const std::optional<Tensor>& bias);

// --- for training ---

std::tuple<Tensor, Tensor> sparse_mlp_train(const Tensor& hidden, const Tensor& routing_weights,
                                            const Tensor& expert_offsets, const Tensor& token_of_row,
                                            const Tensor& row_of_slot, const std::vector<Tensor>& up_weight,
                                            const std::vector<Tensor>& down_weight, const std::vector<Tensor>& up_bias,
                                            const std::vector<Tensor>& down_bias, const std::string& activation,
                                            bool gated, bool allow_tf32, bool batch_invariant, bool zero_unvisited);

std::tuple<Tensor, Tensor, Tensor> activation_grad(const Tensor& grad_out, const Tensor& linear,
                                                   const std::string& activation, bool gated,
                                                   const std::optional<Tensor>& row_scale,
                                                   const std::optional<Tensor>& expert_offsets, bool with_scaled,
                                                   bool with_grad_scale);

std::tuple<Tensor, Tensor> unpermute_grad(const Tensor& grad_out, const std::optional<Tensor>& rows,
                                          const Tensor& row_of_slot, const Tensor& token_of_row,
                                          const std::optional<Tensor>& routing_weights, bool with_grad_rows);

Tensor route_grad(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                  const std::string& scoring, bool renormalize, const std::optional<ScalarType>& probs_dtype,
                  double eps);

Tensor router_stats_grad(const Tensor& grad_prob_sums, const Tensor& grad_z_sums, const Tensor& logits,
                         const std::optional<Tensor>& mask);

}  // namespace moekernels
