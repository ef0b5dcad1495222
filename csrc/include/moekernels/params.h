// The parameters of every op: plain structs, filled by the caller, shared by the CPU and the CUDA side.
//
// Shapes use the letters of the documentation:
//   T tokens, E experts, K choices per token (top_k), N = T * K rows at most, H hidden size, F expert size.
// A *row* is a token's copy in expert order; a *slot* is one choice (t, k) of a token.
// Every matrix has a last dimension of stride 1; the stride of its other dimensions is given in elements.
// A pointer marked "nullable" switches its feature off when it is null.
#pragma once

#include <cstdint>

namespace moekernels {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// How router logits become choices. `ops/reference.py` holds the definition of each rule.
enum class Scoring : int32_t {
  kSoftmax = 0,      // softmax over all experts, then the top_k largest (OLMoE; Switch with top_k = 1)
  kTop2Gate = 1,     // NLLB-MoE: first by rounded probability, second by (noisy) logit
  kSparsemixer = 2,  // PhiMoE: two argmaxes, each weighted by a softmax over its near-ties
};

enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// logits [T, E] -> weights [T, K] float32, expert_ids [T, K] int32 (-1: not routed)
struct RouteParams {
  const void* logits;   // [T, E] of `logits_dtype`
  const float* noise;   // contiguous, nullable: added where an expert is picked, but not to its weight
                        //   kTop2Gate: [T, E], for the second expert; kSparsemixer: [2, T, E], for the first and second
  const uint8_t* mask;  // [T], nullable: tokens with 0 get expert_ids -1 and weights 0
  float* weights;       // [T, K] contiguous
  int32_t* expert_ids;  // [T, K] contiguous
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  Scoring scoring;
  DType logits_dtype;
  DType probs_dtype;  // probabilities are rounded to it before selection (kSoftmax, kTop2Gate)
  bool renormalize;   // divide the chosen weights by their sum
  float epsilon;      // kSparsemixer: experts within 2 * epsilon of the maximum count as near-ties
};

// expert_ids [T, K] -> expert_offsets [E + 1], token_of_row [N], row_of_slot [T, K]
// Rows are sorted by expert, and by (token, slot) within an expert. Ids outside [0, E) are not routed.
struct PlanParams {
  const int32_t* expert_ids;   // [T, K] contiguous
  const int32_t* token_order;  // [T], nullable: the tokens in the order in which they claim places; default 0, 1, ...
  int32_t* expert_offsets;     // [E + 1]
  int32_t* token_of_row;       // [N]; -1 past the last row
  int32_t* row_of_slot;        // [T, K]; -1: dropped or not routed
  void* workspace;             // `plan_workspace` bytes
  int64_t num_tokens;
  int64_t capacity;    // places an expert has per group, claimed by all first choices before any second; < 0: no limit
  int64_t group_size;  // tokens per capacity group (the last group may be short)
  int32_t num_experts;
  int32_t top_k;
};

// hidden [T, H], token_of_row [N] -> rows [N, H]; rows whose token is outside [0, T) become zero
struct PermuteParams {
  const void* hidden;
  const int32_t* token_of_row;
  void* rows;  // contiguous
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t hidden_stride;
  DType dtype;
};

// rows [N, K], weight [E, M, K], expert_offsets [E + 1] -> out [N, M], or [N, M / 2] when gated:
//   out[i] = row_scale[i] * act(rows[i] @ weight[e].T + bias[e])                          e: the expert that owns row i
//   gated: the first M / 2 columns are the gate, the others the value: act(gate) * value
// With `transposed`, weight is [E, K, M] and out[i] = row_scale[i] * (rows[i] @ weight[e]): the gradient of the rows.
// Sums over K in float32. Output rows past expert_offsets[E] become zero.
struct GroupedGemmParams {
  const void* rows;               // [N, K], or [num_source_rows, K] gathered through token_of_row
  const int32_t* token_of_row;    // [N], nullable
  const void* weight;             // [E, M, K], or [E, K, M] if `transposed`
  const void* bias;               // [E, M], nullable, of `dtype`
  const float* row_scale;         // [N], nullable
  const int32_t* expert_offsets;  // [E + 1]
  void* out;                      // contiguous
  void* workspace;                // `grouped_gemm_workspace` bytes
  int64_t num_rows;               // N, the upper bound; the rows in use end at expert_offsets[E]
  int64_t num_source_rows;
  int64_t row_stride;
  int64_t weight_expert_stride;
  int64_t weight_row_stride;  // of M, or of K if `transposed`
  int64_t bias_stride;
  int64_t out_features;  // M
  int64_t in_features;   // K
  int32_t num_experts;
  Activation activation;
  bool gated;
  bool transposed;       // then no bias, no activation and no gate
  bool allow_tf32;       // CUDA, float32 only: torch's own switch
  bool batch_invariant;  // sum in the same order whatever the number of rows; slower on CUDA and for float32 by AMX
  DType dtype;           // of rows, weight, bias and out
};

// rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H]
//   out[t] = sum over k, in order, of weights[t, k] * rows[row_of_slot[t, k]], in float32; slots of -1 add nothing
struct UnpermuteParams {
  const void* rows;
  const int32_t* row_of_slot;  // [T, K] contiguous
  const float* weights;        // [T, K] contiguous, nullable: all ones
  void* out;                   // contiguous
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t row_stride;
  int32_t top_k;
  DType dtype;
};

// --- backward -------------------------------------------------------------------------------------------------------

// grad_rows [N, M], rows [N, K], expert_offsets [E + 1] -> grad_weight [E, M, K], grad_bias [E, M]
//   grad_weight[e] = sum over the rows i of e, in order, of outer(grad_rows[i], rows[i]), in float32
//   grad_bias[e] = sum over the rows i of e, in order, of bias_scale[i] * grad_rows[i]
// Experts without rows get zeros. What lies in rows past expert_offsets[E] (NaN too) has no influence.
struct GroupedWeightGradParams {
  const void* grad_rows;             // [N, M], or [num_source_grad_rows, M] gathered through grad_token_of_row
  const void* rows;                  // [N, K], or [num_source_rows, K] gathered through token_of_row
  const int32_t* grad_token_of_row;  // [N], nullable
  const int32_t* token_of_row;       // [N], nullable
  const float* bias_scale;           // [N], nullable: all ones
  const int32_t* expert_offsets;     // [E + 1]
  void* grad_weight;                 // [E, M, K] contiguous, nullable
  void* grad_bias;                   // [E, M] contiguous, nullable
  void* workspace;                   // `grouped_weight_grad_workspace` bytes
  int64_t num_rows;                  // N, the upper bound
  int64_t num_source_grad_rows;
  int64_t num_source_rows;
  int64_t grad_row_stride;
  int64_t row_stride;
  int64_t out_features;  // M
  int64_t in_features;   // K
  int32_t num_experts;
  bool allow_tf32;  // CUDA, float32 only
  DType dtype;      // of all matrices
};

// query [B, H, Q, D], key and value [B', G, S, D] -> out [B, Q, H, D] = softmax(scale * query @ key.T + bias) @ value
// G divides H and B' divides B: as many consecutive heads, and rows of the batch, as it takes look at the same keys.
// Only on the CPU. Sums and softmax in float32.
struct AttentionParams {
  const void* query;
  const void* key;
  const void* value;
  const void* bias;  // nullable
  void* out;         // contiguous
  void* workspace;   // `attention_workspace` bytes
  int64_t query_strides[3];
  int64_t key_strides[3];
  int64_t value_strides[3];
  int64_t bias_strides[3];  // 0 where it is broadcast
  int64_t bias_batch_size;  // B, B' or 1
  int64_t batch_size;       // B
  int64_t num_heads;        // H
  int64_t num_queries;      // Q
  int64_t key_batch_size;   // B'
  int64_t num_key_heads;    // G
  int64_t num_keys;         // S
  int64_t head_dim;         // D
  float scale;
  DType dtype;
};

// input [N, H], weight [H] -> out [N, H] = weight * input / sqrt(mean(input^2) + epsilon). Only on the CPU.
struct RmsNormParams {
  const void* input;   // contiguous
  const void* weight;  // contiguous
  void* out;           // contiguous
  int64_t num_rows;
  int64_t hidden_size;
  float epsilon;
  DType dtype;
};

// linear [N, 2F] when gated (gate columns first), else [N, F] -> out [N, F] = act(gate) * value, or act(linear)
struct ActivationParams {
  const void* linear;  // contiguous
  void* out;           // contiguous
  int64_t num_rows;
  int64_t width;  // F
  Activation activation;
  bool gated;
  DType dtype;
};

// The same backwards, for rows that are scaled afterwards: with a[i] = act(gate[i]) * value[i] and grad_out the
// gradient of row_scale[i] * a[i] divided by row_scale[i],
//   grad_linear[i] = row_scale[i] * (grad_out[i] * value[i] * act'(gate[i]), grad_out[i] * act(gate[i]))
//   scaled[i] = row_scale[i] * a[i]                        what the gradient of the weight behind it is made of
//   grad_scale[i] = <grad_out[i], a[i]>                    in float32
// Rows from `expert_offsets[E]` on become zero in all three.
struct ActivationGradParams {
  const void* grad_out;           // [N, F] contiguous
  const void* linear;             // [N, 2F] or [N, F] contiguous
  const float* row_scale;         // [N], nullable: all ones
  const int32_t* expert_offsets;  // [E + 1], nullable: all rows count
  void* grad_linear;              // like linear, contiguous; may be `linear`
  void* scaled;                   // [N, F] contiguous, nullable; may be `grad_out`
  float* grad_scale;              // [N], nullable
  int64_t num_rows;
  int64_t width;  // F
  int32_t num_experts;
  Activation activation;
  bool gated;
  DType dtype;
};

// grad_out [T, H], rows [N, H], row_of_slot [T, K], weights [T, K] -> grad_rows [N, H], grad_weights [T, K]
//   grad_rows[row_of_slot[t, k]] = weights[t, k] * grad_out[t]; rows that no slot names become zero
//   grad_weights[t, k] = <grad_out[t], rows[row_of_slot[t, k]]> in float32; zero for slots of -1
struct UnpermuteGradParams {
  const void* grad_out;
  const void* rows;             // nullable if grad_weights is
  const int32_t* row_of_slot;   // [T, K] contiguous
  const int32_t* token_of_row;  // [N], -1 past the last row: how a row finds its token
  const float* weights;         // [T, K] contiguous, nullable: all ones
  void* grad_rows;              // contiguous, nullable
  float* grad_weights;          // [T, K] contiguous, nullable
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t grad_stride;
  int64_t row_stride;
  int32_t top_k;
  DType dtype;
};

// grad_weights [T, K] -> grad_logits [T, E] of `logits_dtype`, for the choice that RouteParams made: probabilities are
// computed again from the logits; `expert_ids` says what was chosen (-1: no gradient). The choice itself, and rounding
// to probs_dtype, have no gradient.
struct RouteGradParams {
  const void* logits;         // [T, E]
  const int32_t* expert_ids;  // [T, K] contiguous
  const float* grad_weights;  // [T, K] contiguous
  void* grad_logits;          // [T, E] contiguous
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  Scoring scoring;
  DType logits_dtype;
  DType probs_dtype;
  bool renormalize;
  float epsilon;
};

// What the auxiliary losses of a router are made of, over G groups of S tokens each (one pass over the logits):
//   counts[g, e]    = sum over tokens of mask * [e is among the top_k most probable]
//   prob_sums[g, e] = sum over tokens of mask * softmax(logits)[e]
//   z_sums[g]       = sum over tokens of mask * logsumexp(logits)^2
// Sums in float32, in an order that depends on the shape alone.
struct RouterStatsParams {
  const void* logits;  // [G * S, E] of `logits_dtype`
  const float* mask;   // [G * S] contiguous, nullable: all ones
  float* counts;       // [G, E] contiguous
  float* prob_sums;    // [G, E] contiguous
  float* z_sums;       // [G]
  void* workspace;     // `router_stats_workspace` bytes
  int64_t num_groups;
  int64_t group_size;  // S
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  DType logits_dtype;
};

// The gradients of prob_sums and z_sums (counts have none):
//   grad_logits[t, e] = mask[t] * p[e] * (grad_prob_sums[g, e] - <grad_prob_sums[g], p> + 2 * lse * grad_z_sums[g])
struct RouterStatsGradParams {
  const void* logits;
  const float* mask;
  const float* grad_prob_sums;  // [G, E] contiguous
  const float* grad_z_sums;     // [G]
  void* grad_logits;            // [G * S, E] contiguous, of `logits_dtype`
  int64_t num_groups;
  int64_t group_size;
  int64_t logits_stride;
  int32_t num_experts;
  DType logits_dtype;
};

}  // namespace moekernels
