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

// How a logit becomes an expert's score.
enum class Score : int32_t {
  kSoftmax = 0,
  kSigmoid = 1,
  kSqrtSoftplus = 2,  // sqrt(log(1 + exp(x))) (DeepSeek-V4)
};

enum class Activation : int32_t {
  kNone = 0,
  kRelu = 1,
  kGelu = 2,
  kGeluTanh = 3,
  kSilu = 4,
  kRelu2 = 5,   // the square of kRelu (Nemotron-H)
  kSwiglu = 6,  // always gated, see Swiglu
};

// With g = min(gate, limit) and v = min(max(value, -limit), limit):  g * sigmoid(alpha * g) * (v + shift)
struct Swiglu {
  float alpha;
  float limit;
  float shift;
  bool interleaved;  // gate and value of a column are neighbours; not in a grouped GEMM
};

// logits [T, E] -> weights [T, K] float32, expert_ids [T, K] int32 (-1: not routed)
struct RouteParams {
  static constexpr const char* kOp = "route";
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
  float eps;          // kSparsemixer: experts within 2 * eps of the maximum count as near-ties
};

// logits [T, E] -> weights [T, K] float32, expert_ids [T, K] int32 (-1: not routed)
// With c = score + bias: of the groups of neighbouring experts those with the largest sums of their two largest c, of
// their experts those of largest c. Weights are scores.
struct RouteByScoreParams {
  static constexpr const char* kOp = "route_by_score";
  const void* logits;   // [T, E] of `logits_dtype`
  const float* bias;    // [E], nullable
  const uint8_t* mask;  // [T], nullable: tokens with 0 get expert_ids -1 and weights 0
  float* weights;       // [T, K] contiguous
  int32_t* expert_ids;  // [T, K] contiguous
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  int32_t num_groups;
  int32_t top_groups;
  Score score;
  DType logits_dtype;
  bool renormalize;  // divide the weights of a token by their sum
  float scale;       // then multiply them with it
};

// matrix [M, N] -> out [N, M]
struct TransposeParams {
  static constexpr const char* kOp = "transpose";
  const void* matrix;
  void* out;  // contiguous
  int64_t num_rows;
  int64_t num_cols;
  int64_t stride;
  int64_t element_size;  // bytes: 2 or 4
};

// expert_ids [T, K] -> expert_offsets [E + 1], token_of_row [N], row_of_slot [T, K]
// Rows are sorted by expert, and by (token, slot) within an expert. Ids outside [0, E) are not routed.
struct PlanParams {
  static constexpr const char* kOp = "plan";
  const int32_t* expert_ids;   // [T, K] contiguous
  const int32_t* token_order;  // [T], nullable: the tokens in the order in which they claim places; default 0, 1, ...
  int32_t* expert_offsets;     // [E + 1]
  int32_t* token_of_row;       // [N]; -1 past the last row
  int32_t* row_of_slot;        // [T, K]; -1: dropped or not routed
  void* workspace;             // on a GPU: `workspace_bytes`
  int64_t num_tokens;
  int64_t capacity;    // places an expert has per group, claimed by all first choices before any second; < 0: no limit
  int64_t group_size;  // tokens per capacity group (the last group may be short)
  int32_t num_experts;
  int32_t top_k;
};

// hidden [T, H], token_of_row [N] -> rows [N, H]; rows whose token is outside [0, T) become zero
struct PermuteParams {
  static constexpr const char* kOp = "permute";
  const void* hidden;
  const int32_t* token_of_row;
  void* rows;  // contiguous
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t hidden_stride;
  DType dtype;
};

// One of the matrices that a weight may come as.
struct WeightPart {
  const void* data;
  int64_t row_stride;
};

// rows [N, K], weight [E, M, K], expert_offsets [E + 1] -> out [N, M], or [N, M / 2] when gated:
//   out[i] = row_scale[i] * act(rows[i] @ weight[e].T + bias[e])                          e: the expert that owns row i
//   gated: the first M / 2 columns are the gate, the others the value: act(gate) * value
// With `transposed`, weight is [E, K, M] and out[i] = row_scale[i] * (rows[i] @ weight[e] + bias[e]); without a bias it
// is the gradient of the rows.
// Sums over K in float32. Output rows past expert_offsets[E] become zero. On CUDA kRelu2, kSwiglu, and a bias beside
// `transposed` are cudaErrorInvalidValue: these activations are an op of their own there (ActivationParams).
//
// The weight may also come as a table of E * P matrices that lie anywhere, expert slowest: the rows of an expert's P
// parts, of equal number, follow one another. Gated, P is 1 or even. The bias may then come as E * P vectors.
struct GroupedGemmParams {
  static constexpr const char* kOp = "grouped_gemm";
  const void* rows;                // [N, K], or [num_source_rows, K] gathered through token_of_row
  const int32_t* token_of_row;     // [N], nullable
  const void* weight;              // [E, M, K], or [E, K, M] if `transposed`; unused beside `weight_parts`
  const WeightPart* weight_parts;  // [E * P] in host memory, nullable
  const void* bias;                // [E, M], nullable, of `dtype`
  const void* const* bias_parts;   // [E * P] in host memory, nullable: in place of `bias`
  const float* row_scale;          // [N], nullable
  const int32_t* expert_offsets;   // [E + 1]
  void* out;                       // contiguous
  void* workspace;                 // CUDA, where there are parts: `workspace_bytes` bytes
  int64_t num_rows;                // N, the upper bound; the rows in use end at expert_offsets[E]
  int64_t num_source_rows;
  int64_t row_stride;
  int64_t weight_expert_stride;
  int64_t weight_row_stride;  // of M, or of K if `transposed`
  int64_t bias_stride;
  int64_t out_features;  // M
  int64_t in_features;   // K
  int32_t num_experts;
  int32_t num_parts;  // P, where there are parts
  Activation activation;
  Swiglu swiglu;  // of kSwiglu
  bool gated;
  bool transposed;       // then no activation, no gate and no bias_parts
  bool allow_tf32;       // CUDA, float32 only: torch's own switch
  bool batch_invariant;  // sum in the same order whatever the number of rows; slower on CUDA and for float32 by AMX
  DType dtype;           // of rows, weight, bias and out
};

// How the codes of a quantised weight lie, in the order of its rows.
enum class CodeOrder : int32_t {
  kPairs,   // 4 bits: byte i holds weight 2 i in its high nibble and weight 2 i + 1 in its low one
  kHalves,  // 4 bits: byte i of 16 holds weight i of 32 in its low nibble and weight 16 + i in its high one
  kBytes,   // signed bytes
};

// A weight [E, M, K] in few bits: w = value(code) * scale, with a scale for every `group` weights, which divides K.
// 4-bit codes are a multiple of 32 per row; group is K or a power of 2 of at least 32. Of a `transposed` product, whose
// weight is [E, K, M], a row has M.
struct QuantizedWeightParams {
  const void* codes;
  const void* scales;
  const float* table;   // [16], the value of each 4-bit code; null: code - 8, and of a byte the code itself
  const float* map;     // [256], nullable: scales are uint8, scale = map[scale] * nested[i] + offset[i], i = 256 scales
  const float* nested;  // beside `map`
  const float* offset;  // beside `map`
  int64_t codes_stride;  // between experts, in elements, as the following
  int64_t scales_stride;
  int64_t nested_stride;
  int64_t group;
  float unit;  // what every scale is multiplied with
  CodeOrder order;
  DType scales_dtype;  // float32 or float16; none beside `map`
};

// The grouped GEMM with a quantised weight: `gemm` has everything else. Not in parts; on a CPU and in float32 not
// transposed.
struct QuantizedGemmParams {
  static constexpr const char* kOp = "quantized_gemm";
  GroupedGemmParams gemm;
  QuantizedWeightParams weight;  // without a table if int8_rows
  bool int8_rows;                // round each row to 127 steps to either side first
  float int8_threshold;          // but for its elements of this magnitude and more, which stay as they are; 0: none do.
                                 // With codes in bytes and a scale for each row of the weight alone
};

// rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H]
//   out[t] = sum over k, in order, of weights[t, k] * rows[row_of_slot[t, k]], in float32; slots of -1 add nothing
struct UnpermuteParams {
  static constexpr const char* kOp = "unpermute";
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
  static constexpr const char* kOp = "grouped_weight_grad";
  const void* grad_rows;             // [N, M], or [num_source_grad_rows, M] gathered through grad_token_of_row
  const void* rows;                  // [N, K], or [num_source_rows, K] gathered through token_of_row
  const int32_t* grad_token_of_row;  // [N], nullable
  const int32_t* token_of_row;       // [N], nullable
  const float* bias_scale;           // [N], nullable: all ones
  const int32_t* expert_offsets;     // [E + 1]
  void* grad_weight;                 // [E, M, K] contiguous, nullable
  void* grad_bias;                   // [E, M] contiguous, nullable
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
  static constexpr const char* kOp = "attention";
  const void* query;
  const void* key;
  const void* value;
  const void* bias;  // nullable
  void* out;         // contiguous
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

// input [N, H], weight [H] -> out [N, H] = weight * input / sqrt(mean(input^2) + eps). Only on the CPU.
struct RmsNormParams {
  static constexpr const char* kOp = "rms_norm";
  const void* input;   // contiguous
  const void* weight;  // contiguous
  void* out;           // contiguous
  int64_t num_rows;
  int64_t hidden_size;
  float eps;
  DType dtype;
};

// linear [N, 2F] when gated (gate columns first), else [N, F] -> out [N, F] = act(gate) * value, or act(linear)
struct ActivationParams {
  static constexpr const char* kOp = "activation";
  const void* linear;  // contiguous
  void* out;           // contiguous
  int64_t num_rows;
  int64_t width;  // F
  Activation activation;
  Swiglu swiglu;  // of kSwiglu
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
  static constexpr const char* kOp = "activation_grad";
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
  Swiglu swiglu;  // of kSwiglu
  bool gated;
  DType dtype;
};

// grad_out [T, H], rows [N, H], row_of_slot [T, K], weights [T, K] -> grad_rows [N, H], grad_weights [T, K]
//   grad_rows[row_of_slot[t, k]] = weights[t, k] * grad_out[t]; rows that no slot names become zero
//   grad_weights[t, k] = <grad_out[t], rows[row_of_slot[t, k]]> in float32; zero for slots of -1
struct UnpermuteGradParams {
  static constexpr const char* kOp = "unpermute_grad";
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
  static constexpr const char* kOp = "route_grad";
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
  float eps;
};

// What the auxiliary losses of a router are made of, over G groups of S tokens each (one pass over the logits):
//   counts[g, e]    = sum over tokens of mask * [e is among the top_k most probable]
//   prob_sums[g, e] = sum over tokens of mask * softmax(logits)[e]
//   z_sums[g]       = sum over tokens of mask * logsumexp(logits)^2
// Sums in float32, in an order that depends on the shape alone.
struct RouterStatsParams {
  static constexpr const char* kOp = "router_stats";
  const void* logits;  // [G * S, E] of `logits_dtype`
  const float* mask;   // [G * S] contiguous, nullable: all ones
  float* counts;       // [G, E] contiguous
  float* prob_sums;    // [G, E] contiguous
  float* z_sums;       // [G]
  void* workspace;     // on a GPU: `workspace_bytes`
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
  static constexpr const char* kOp = "router_stats_grad";
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
