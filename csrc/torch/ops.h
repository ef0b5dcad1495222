// The ops as functions on tensors: check, allocate, fill the parameter struct, launch on the tensors' device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace moekernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, const std::string& scoring, bool renormalize,
                                 const std::optional<ScalarType>& probs_dtype, double epsilon,
                                 const std::optional<Tensor>& noise, const std::optional<Tensor>& mask);

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& expert_ids, int64_t num_experts,
                                        const std::optional<int64_t>& capacity,
                                        const std::optional<int64_t>& group_size,
                                        const std::optional<Tensor>& token_order);

Tensor permute(const Tensor& hidden, const Tensor& token_of_row, const std::optional<Tensor>& row_of_slot);

Tensor grouped_gemm(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                    const std::optional<Tensor>& bias, const std::string& activation, bool gated,
                    const std::optional<Tensor>& row_scale, const std::optional<Tensor>& token_of_row, bool allow_tf32,
                    bool batch_invariant, bool transposed);

std::tuple<Tensor, Tensor> grouped_weight_grad(const Tensor& grad_rows, const Tensor& rows,
                                               const Tensor& expert_offsets,
                                               const std::optional<Tensor>& grad_token_of_row,
                                               const std::optional<Tensor>& token_of_row,
                                               const std::optional<Tensor>& bias_scale, bool need_bias,
                                               bool allow_tf32);

Tensor unpermute(const Tensor& rows, const Tensor& row_of_slot, const std::optional<Tensor>& weights);

Tensor sparse_mlp(const Tensor& hidden, const Tensor& expert_weights, const Tensor& expert_offsets,
                  const Tensor& token_of_row, const Tensor& row_of_slot, const Tensor& up_weight,
                  const Tensor& down_weight, const std::optional<Tensor>& up_bias,
                  const std::optional<Tensor>& down_bias, const std::string& activation, bool gated, bool allow_tf32,
                  bool batch_invariant);

Tensor activation(const Tensor& linear, const std::string& activation, bool gated);

std::tuple<Tensor, Tensor, Tensor> router_stats(const Tensor& logits, int64_t num_groups, int64_t top_k,
                                                const std::optional<Tensor>& mask);

// --- what else a decoding step needs, on the CPU ---

Tensor rms_norm(const Tensor& input, const Tensor& weight, double epsilon);

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::string& activation, bool batch_invariant);

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                 const std::optional<Tensor>& bias);

// --- for training ---

std::tuple<Tensor, Tensor> sparse_mlp_train(const Tensor& hidden, const Tensor& expert_weights,
                                            const Tensor& expert_offsets, const Tensor& token_of_row,
                                            const Tensor& row_of_slot, const Tensor& up_weight,
                                            const Tensor& down_weight, const std::optional<Tensor>& up_bias,
                                            const std::optional<Tensor>& down_bias, const std::string& activation,
                                            bool gated, bool allow_tf32, bool batch_invariant);

std::tuple<Tensor, Tensor, Tensor> activation_grad(const Tensor& grad_out, const Tensor& linear,
                                                   const std::string& activation, bool gated,
                                                   const std::optional<Tensor>& row_scale,
                                                   const std::optional<Tensor>& expert_offsets, bool with_scaled,
                                                   bool with_grad_scale);

std::tuple<Tensor, Tensor> unpermute_grad(const Tensor& grad_out, const std::optional<Tensor>& rows,
                                          const Tensor& row_of_slot, const Tensor& token_of_row,
                                          const std::optional<Tensor>& weights, bool with_grad_rows);

Tensor route_grad(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                  const std::string& scoring, bool renormalize, const std::optional<ScalarType>& probs_dtype,
                  double epsilon);

Tensor router_stats_grad(const Tensor& grad_prob_sums, const Tensor& grad_z_sums, const Tensor& logits,
                         const std::optional<Tensor>& mask);

}  // namespace moekernels
