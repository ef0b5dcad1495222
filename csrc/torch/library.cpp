// The table of contents: every op of torch.ops.moekernels with its schema. Shape functions and gradients are registered
// from Python (moekernels/ops/_shapes.py, _gradients.py); what each op computes is defined in
// moekernels/ops/reference.py.
#include "box.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(moekernels, m) {
  m.def(
      "route(Tensor logits, int top_k, str scoring='softmax', bool renormalize=False, ScalarType? probs_dtype=None, "
      "float eps=0.01, Tensor? noise=None, Tensor? mask=None) -> (Tensor weights, Tensor expert_ids)");
  m.def(
      "plan(Tensor expert_ids, int num_experts, SymInt? capacity=None, SymInt? group_size=None, "
      "Tensor? token_order=None) -> (Tensor expert_offsets, Tensor token_of_row, Tensor row_of_slot)");
  m.def("permute(Tensor hidden, Tensor token_of_row, Tensor? row_of_slot=None) -> Tensor");
  m.def(
      "grouped_gemm(Tensor rows, Tensor[] weight, Tensor expert_offsets, Tensor[] bias, str activation='none', "
      "bool gated=False, Tensor? row_scale=None, Tensor? token_of_row=None, bool allow_tf32=False, "
      "bool batch_invariant=False, bool transposed=False, bool zero_unvisited=False) -> Tensor");
  m.def(
      "grouped_weight_grad(Tensor grad_rows, Tensor rows, Tensor expert_offsets, Tensor? grad_token_of_row=None, "
      "Tensor? token_of_row=None, Tensor? bias_scale=None, bool need_bias=False, bool allow_tf32=False) "
      "-> (Tensor grad_weight, Tensor grad_bias)");
  m.def("unpermute(Tensor rows, Tensor row_of_slot, Tensor? routing_weights=None) -> Tensor");
  m.def(
      "sparse_mlp(Tensor hidden, Tensor routing_weights, Tensor expert_offsets, Tensor token_of_row, "
      "Tensor row_of_slot, Tensor[] up_weight, Tensor[] down_weight, Tensor[] up_bias, Tensor[] down_bias, "
      "str activation='silu', bool gated=True, bool allow_tf32=False, bool batch_invariant=False) -> Tensor");
  m.def("activation(Tensor linear, str activation, bool gated) -> Tensor");
  m.def(
      "router_stats(Tensor logits, SymInt num_groups, int top_k, Tensor? mask=None) "
      "-> (Tensor counts, Tensor prob_sums, Tensor z_sums)");

  // Without gradients: the Python functions see to them, and dequantise the weight where it has no kernel.
  m.def(
      "quantized_gemm(Tensor rows, Tensor codes, Tensor scales, Tensor[] tables, str order, int group, float unit, "
      "int out_features, Tensor expert_offsets, Tensor? bias=None, str activation='none', bool gated=False, "
      "Tensor? row_scale=None, Tensor? token_of_row=None, bool batch_invariant=False, bool int8_rows=False, "
      "float int8_threshold=0.0, bool transposed=False) -> Tensor");

  // On the CPU, and without gradients: the Python functions leave everything else to torch.
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias=None, str activation='none', bool batch_invariant=False) -> "
      "Tensor");
  m.def(
      "route_by_score(Tensor logits, int top_k, str score='sigmoid', Tensor? selection_bias=None, int num_groups=1, "
      "int? top_groups=None, bool renormalize=False, float scale=1.0, Tensor? mask=None) "
      "-> (Tensor weights, Tensor expert_ids)");
  m.def("transpose(Tensor matrix) -> Tensor");
  m.def("rms_norm(Tensor input, Tensor weight, float eps) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? bias=None) -> Tensor");

  // What gradients are made of.
  m.def(
      "sparse_mlp_train(Tensor hidden, Tensor routing_weights, Tensor expert_offsets, Tensor token_of_row, "
      "Tensor row_of_slot, Tensor[] up_weight, Tensor[] down_weight, Tensor[] up_bias, Tensor[] down_bias, "
      "str activation='silu', bool gated=True, bool allow_tf32=False, bool batch_invariant=False, "
      "bool zero_unvisited=False) -> (Tensor out, Tensor linear)");
  m.def(
      "activation_grad(Tensor grad_out, Tensor linear, str activation, bool gated, Tensor? row_scale=None, "
      "Tensor? expert_offsets=None, bool with_scaled=True, bool with_grad_scale=True) "
      "-> (Tensor grad_linear, Tensor scaled, Tensor grad_scale)");
  m.def(
      "unpermute_grad(Tensor grad_out, Tensor? rows, Tensor row_of_slot, Tensor token_of_row, "
      "Tensor? routing_weights=None, bool with_grad_rows=True) -> (Tensor grad_rows, Tensor grad_weights)");
  m.def(
      "route_grad(Tensor grad_weights, Tensor logits, Tensor expert_ids, str scoring='softmax', "
      "bool renormalize=False, ScalarType? probs_dtype=None, float eps=0.01) -> Tensor");
  m.def("router_stats_grad(Tensor grad_prob_sums, Tensor grad_z_sums, Tensor logits, Tensor? mask=None) -> Tensor");
}

namespace {

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("route", MOEKERNELS_BOX(route));
  m.impl("plan", MOEKERNELS_BOX(plan));
  m.impl("permute", MOEKERNELS_BOX(permute));
  m.impl("grouped_gemm", MOEKERNELS_BOX(grouped_gemm));
  m.impl("quantized_gemm", MOEKERNELS_BOX(quantized_gemm));
  m.impl("grouped_weight_grad", MOEKERNELS_BOX(grouped_weight_grad));
  m.impl("unpermute", MOEKERNELS_BOX(unpermute));
  m.impl("sparse_mlp", MOEKERNELS_BOX(sparse_mlp));
  m.impl("activation", MOEKERNELS_BOX(activation));
  m.impl("router_stats", MOEKERNELS_BOX(router_stats));
  m.impl("sparse_mlp_train", MOEKERNELS_BOX(sparse_mlp_train));
  m.impl("activation_grad", MOEKERNELS_BOX(activation_grad));
  m.impl("unpermute_grad", MOEKERNELS_BOX(unpermute_grad));
  m.impl("route_grad", MOEKERNELS_BOX(route_grad));
  m.impl("router_stats_grad", MOEKERNELS_BOX(router_stats_grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moekernels, CPU, m) {
  register_all(m);
  m.impl("linear", MOEKERNELS_BOX(linear));
  m.impl("route_by_score", MOEKERNELS_BOX(route_by_score));
  m.impl("transpose", MOEKERNELS_BOX(transpose));
  m.impl("rms_norm", MOEKERNELS_BOX(rms_norm));
  m.impl("attention", MOEKERNELS_BOX(attention));
}

#ifdef MOEKERNELS_CUDA
STABLE_TORCH_LIBRARY_IMPL(moekernels, CUDA, m) {
  register_all(m);
}
#endif
