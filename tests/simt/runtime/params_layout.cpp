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
  FIELD(RouteParams, epsilon);

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
  FIELD(GroupedGemmParams, bias);
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
  FIELD(GroupedGemmParams, activation);
  FIELD(GroupedGemmParams, gated);
  FIELD(GroupedGemmParams, allow_tf32);
  FIELD(GroupedGemmParams, batch_invariant);
  FIELD(GroupedGemmParams, dtype);

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
#undef FIELD
#undef STRUCT
  return text;
}

}  // namespace

extern "C" const char* simt_params_layout() {
  static const std::string text = layout();
  return text.c_str();
}
