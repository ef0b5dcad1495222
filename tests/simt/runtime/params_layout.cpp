// Where C++ puts every field of the parameter structs, for the mirror in tests/simt/params.py.
#include <cstddef>
#include <string>

#include "moekernels/params.h"

namespace {

using namespace moekernels;

std::string layout() {
  std::string text;
#define STRUCT(type) text += #type " . " + std::to_string(sizeof(type)) + " 0\n"
#define FIELD(type, name) \
  text += #type " " #name " " + std::to_string(sizeof(type::name)) + " " + std::to_string(offsetof(type, name)) + "\n"
  STRUCT(RouteParams);
  FIELD(RouteParams, logits);
  FIELD(RouteParams, noise);
  FIELD(RouteParams, mask);
  FIELD(RouteParams, weights);
  FIELD(RouteParams, expert_ids);
  FIELD(RouteParams, num_tokens);
  FIELD(RouteParams, logits_stride);
  FIELD(RouteParams, num_experts);
  FIELD(RouteParams, top_k);
  FIELD(RouteParams, scoring);
  FIELD(RouteParams, logits_dtype);
  FIELD(RouteParams, probs_dtype);
  FIELD(RouteParams, renormalize);
  FIELD(RouteParams, eps);

  STRUCT(PlanParams);
  FIELD(PlanParams, expert_ids);
  FIELD(PlanParams, token_order);
  FIELD(PlanParams, expert_offsets);
  FIELD(PlanParams, token_of_row);
  FIELD(PlanParams, row_of_slot);
  FIELD(PlanParams, workspace);
  FIELD(PlanParams, num_tokens);
  FIELD(PlanParams, capacity);
  FIELD(PlanParams, group_size);
  FIELD(PlanParams, num_experts);
  FIELD(PlanParams, top_k);

  STRUCT(PermuteParams);
  FIELD(PermuteParams, hidden);
  FIELD(PermuteParams, token_of_row);
  FIELD(PermuteParams, rows);
  FIELD(PermuteParams, num_tokens);
  FIELD(PermuteParams, num_rows);
  FIELD(PermuteParams, hidden_size);
  FIELD(PermuteParams, hidden_stride);
  FIELD(PermuteParams, dtype);

  STRUCT(GroupedGemmParams);
  FIELD(GroupedGemmParams, rows);
  FIELD(GroupedGemmParams, token_of_row);
  FIELD(GroupedGemmParams, weight);
  FIELD(GroupedGemmParams, weight_parts);
  FIELD(GroupedGemmParams, bias);
  FIELD(GroupedGemmParams, bias_parts);
  FIELD(GroupedGemmParams, row_scale);
  FIELD(GroupedGemmParams, expert_offsets);
  FIELD(GroupedGemmParams, out);
  FIELD(GroupedGemmParams, workspace);
  FIELD(GroupedGemmParams, num_rows);
  FIELD(GroupedGemmParams, num_source_rows);
  FIELD(GroupedGemmParams, row_stride);
  FIELD(GroupedGemmParams, weight_expert_stride);
  FIELD(GroupedGemmParams, weight_row_stride);
  FIELD(GroupedGemmParams, bias_stride);
  FIELD(GroupedGemmParams, out_features);
  FIELD(GroupedGemmParams, in_features);
  FIELD(GroupedGemmParams, num_experts);
  FIELD(GroupedGemmParams, num_parts);
  FIELD(GroupedGemmParams, activation);
  FIELD(GroupedGemmParams, swiglu);
  FIELD(GroupedGemmParams, gated);
  FIELD(GroupedGemmParams, transposed);
  FIELD(GroupedGemmParams, allow_tf32);
  FIELD(GroupedGemmParams, batch_invariant);
  FIELD(GroupedGemmParams, dtype);

  STRUCT(QuantizedWeightParams);
  FIELD(QuantizedWeightParams, codes);
  FIELD(QuantizedWeightParams, scales);
  FIELD(QuantizedWeightParams, table);
  FIELD(QuantizedWeightParams, map);
  FIELD(QuantizedWeightParams, nested);
  FIELD(QuantizedWeightParams, offset);
  FIELD(QuantizedWeightParams, codes_stride);
  FIELD(QuantizedWeightParams, scales_stride);
  FIELD(QuantizedWeightParams, nested_stride);
  FIELD(QuantizedWeightParams, group);
  FIELD(QuantizedWeightParams, unit);
  FIELD(QuantizedWeightParams, order);
  FIELD(QuantizedWeightParams, scales_dtype);

  STRUCT(QuantizedGemmParams);
  FIELD(QuantizedGemmParams, gemm);
  FIELD(QuantizedGemmParams, weight);
  FIELD(QuantizedGemmParams, int8_rows);
  FIELD(QuantizedGemmParams, int8_threshold);

  STRUCT(UnpermuteParams);
  FIELD(UnpermuteParams, rows);
  FIELD(UnpermuteParams, row_of_slot);
  FIELD(UnpermuteParams, weights);
  FIELD(UnpermuteParams, out);
  FIELD(UnpermuteParams, num_tokens);
  FIELD(UnpermuteParams, num_rows);
  FIELD(UnpermuteParams, hidden_size);
  FIELD(UnpermuteParams, row_stride);
  FIELD(UnpermuteParams, top_k);
  FIELD(UnpermuteParams, dtype);

  STRUCT(GroupedWeightGradParams);
  FIELD(GroupedWeightGradParams, grad_rows);
  FIELD(GroupedWeightGradParams, rows);
  FIELD(GroupedWeightGradParams, grad_token_of_row);
  FIELD(GroupedWeightGradParams, token_of_row);
  FIELD(GroupedWeightGradParams, bias_scale);
  FIELD(GroupedWeightGradParams, expert_offsets);
  FIELD(GroupedWeightGradParams, grad_weight);
  FIELD(GroupedWeightGradParams, grad_bias);
  FIELD(GroupedWeightGradParams, num_rows);
  FIELD(GroupedWeightGradParams, num_source_grad_rows);
  FIELD(GroupedWeightGradParams, num_source_rows);
  FIELD(GroupedWeightGradParams, grad_row_stride);
  FIELD(GroupedWeightGradParams, row_stride);
  FIELD(GroupedWeightGradParams, out_features);
  FIELD(GroupedWeightGradParams, in_features);
  FIELD(GroupedWeightGradParams, num_experts);
  FIELD(GroupedWeightGradParams, allow_tf32);
  FIELD(GroupedWeightGradParams, dtype);

  STRUCT(ActivationParams);
  FIELD(ActivationParams, linear);
  FIELD(ActivationParams, out);
  FIELD(ActivationParams, num_rows);
  FIELD(ActivationParams, width);
  FIELD(ActivationParams, activation);
  FIELD(ActivationParams, swiglu);
  FIELD(ActivationParams, gated);
  FIELD(ActivationParams, dtype);

  STRUCT(ActivationGradParams);
  FIELD(ActivationGradParams, grad_out);
  FIELD(ActivationGradParams, linear);
  FIELD(ActivationGradParams, row_scale);
  FIELD(ActivationGradParams, expert_offsets);
  FIELD(ActivationGradParams, grad_linear);
  FIELD(ActivationGradParams, scaled);
  FIELD(ActivationGradParams, grad_scale);
  FIELD(ActivationGradParams, num_rows);
  FIELD(ActivationGradParams, width);
  FIELD(ActivationGradParams, num_experts);
  FIELD(ActivationGradParams, activation);
  FIELD(ActivationGradParams, swiglu);
  FIELD(ActivationGradParams, gated);
  FIELD(ActivationGradParams, dtype);

  STRUCT(UnpermuteGradParams);
  FIELD(UnpermuteGradParams, grad_out);
  FIELD(UnpermuteGradParams, rows);
  FIELD(UnpermuteGradParams, row_of_slot);
  FIELD(UnpermuteGradParams, token_of_row);
  FIELD(UnpermuteGradParams, weights);
  FIELD(UnpermuteGradParams, grad_rows);
  FIELD(UnpermuteGradParams, grad_weights);
  FIELD(UnpermuteGradParams, num_tokens);
  FIELD(UnpermuteGradParams, num_rows);
  FIELD(UnpermuteGradParams, hidden_size);
  FIELD(UnpermuteGradParams, grad_stride);
  FIELD(UnpermuteGradParams, row_stride);
  FIELD(UnpermuteGradParams, top_k);
  FIELD(UnpermuteGradParams, dtype);

  STRUCT(RouteGradParams);
  FIELD(RouteGradParams, logits);
  FIELD(RouteGradParams, expert_ids);
  FIELD(RouteGradParams, grad_weights);
  FIELD(RouteGradParams, grad_logits);
  FIELD(RouteGradParams, num_tokens);
  FIELD(RouteGradParams, logits_stride);
  FIELD(RouteGradParams, num_experts);
  FIELD(RouteGradParams, top_k);
  FIELD(RouteGradParams, scoring);
  FIELD(RouteGradParams, logits_dtype);
  FIELD(RouteGradParams, probs_dtype);
  FIELD(RouteGradParams, renormalize);
  FIELD(RouteGradParams, eps);

  STRUCT(RouterStatsParams);
  FIELD(RouterStatsParams, logits);
  FIELD(RouterStatsParams, mask);
  FIELD(RouterStatsParams, counts);
  FIELD(RouterStatsParams, prob_sums);
  FIELD(RouterStatsParams, z_sums);
  FIELD(RouterStatsParams, workspace);
  FIELD(RouterStatsParams, num_groups);
  FIELD(RouterStatsParams, group_size);
  FIELD(RouterStatsParams, logits_stride);
  FIELD(RouterStatsParams, num_experts);
  FIELD(RouterStatsParams, top_k);
  FIELD(RouterStatsParams, logits_dtype);

  STRUCT(RouterStatsGradParams);
  FIELD(RouterStatsGradParams, logits);
  FIELD(RouterStatsGradParams, mask);
  FIELD(RouterStatsGradParams, grad_prob_sums);
  FIELD(RouterStatsGradParams, grad_z_sums);
  FIELD(RouterStatsGradParams, grad_logits);
  FIELD(RouterStatsGradParams, num_groups);
  FIELD(RouterStatsGradParams, group_size);
  FIELD(RouterStatsGradParams, logits_stride);
  FIELD(RouterStatsGradParams, num_experts);
  FIELD(RouterStatsGradParams, logits_dtype);
#undef FIELD
#undef STRUCT
  return text;
}

}  // namespace

extern "C" const char* simt_params_layout() {
  static const std::string text = layout();
  return text.c_str();
}
