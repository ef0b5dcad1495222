// One MoE layer in a LibTorch program. Prints how far it is from the same layer in torch's own ops, in float64.
#include <ATen/ATen.h>

#include <cstdio>
#include <cstdlib>

#include "moekernels/torch_ops.h"

int main() {
  namespace ops = moekernels::torch_ops;
  at::manual_seed(7);
  const int64_t tokens = 37, hidden_size = 64, ffn_size = 48, experts = 8, top_k = 2;
  const at::Tensor hidden = at::randn({tokens, hidden_size});
  const at::Tensor logits = at::randn({tokens, experts});
  const at::Tensor up = at::randn({experts, 2 * ffn_size, hidden_size}) * 0.1;
  const at::Tensor down = at::randn({experts, hidden_size, ffn_size}) * 0.1;

  const ops::Routing routing = ops::route(logits, top_k);
  const ops::Plan plan = ops::plan(routing.expert_ids, experts);
  const at::Tensor out = ops::sparse_mlp(hidden, routing.weights, plan, up, down);

  const at::Tensor ids = routing.expert_ids.to(at::kLong);  // [T, K]
  const at::Tensor gate_up = at::einsum("th,tkfh->tkf", {hidden.to(at::kDouble), up.to(at::kDouble).index({ids})});
  const auto halves = gate_up.chunk(2, -1);
  const at::Tensor inner = at::silu(halves[0]) * halves[1];
  const at::Tensor each = at::einsum("tkf,tkhf->tkh", {inner, down.to(at::kDouble).index({ids})});
  const at::Tensor expected = at::einsum("tkh,tk->th", {each, routing.weights.to(at::kDouble)});
  const double worst = (out - expected).abs().max().item<double>();
  std::printf("%lld tokens through %lld experts: largest error %.1e\n", static_cast<long long>(tokens),
              static_cast<long long>(experts), worst);
  return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
