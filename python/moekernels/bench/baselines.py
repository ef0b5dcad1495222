"""What plain PyTorch has for each kernel and for a layer after the routing, each as a function without arguments.

The definitions in :mod:`moekernels.ops.reference` are written to be read; these are written as one would for speed.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops
from moekernels.bench.clocks import Run
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.ops import Plan, reference
from moekernels.ops.activation import ACTIVATION_FUNCTIONS

EAGER = "torch eager"
GROUPED_MM = "torch grouped_mm"


def activate(y: Tensor, shape: LayerShape) -> Tensor:
    act = ACTIVATION_FUNCTIONS[shape.activation]
    if not shape.gated:
        return act(y)
    gate, value = y.chunk(2, dim=-1)
    return act(gate) * value


def route(logits: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
    if shape.scoring != "softmax":
        return reference.route(logits, shape.top_k, scoring=shape.scoring)
    return torch.softmax(logits, dim=-1, dtype=torch.float32).topk(shape.top_k)


def plan(expert_ids: Tensor, num_experts: int) -> Plan:
    ids = expert_ids.flatten()
    order = torch.argsort(ids, stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    offsets[1:] = torch.bincount(ids, minlength=num_experts).cumsum(0)
    row_of_slot = torch.empty_like(order).scatter_(0, order, torch.arange(ids.numel(), device=ids.device))
    return Plan(offsets, order // expert_ids.shape[1], row_of_slot.view(expert_ids.shape))


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    return (rows[row_of_slot] * weights.unsqueeze(-1)).sum(1)


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product per expert that has rows."""
    outputs = [
        F.linear(rows[begin:end], weight[e], None if bias is None else bias[e])
        for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist()))
        if end > begin
    ]
    return torch.cat(outputs) if outputs else rows.new_empty(0, weight.shape[1])


def grouped_weight_grad(grad_rows: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """One product per expert that has rows."""
    bounds = expert_offsets.tolist()
    out = rows.new_zeros(len(bounds) - 1, grad_rows.shape[1], rows.shape[1])
    for e, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            torch.mm(grad_rows[begin:end].T, rows[begin:end], out=out[e])
    return out


def unpermute_grad(grad_out: Tensor, rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows = torch.empty_like(rows)
    grad_rows[row_of_slot] = weights.to(rows.dtype).unsqueeze(-1) * grad_out.unsqueeze(1)
    return grad_rows, torch.einsum("tkh,th->tk", rows[row_of_slot], grad_out)


def activation_grad(
    grad_out: Tensor, linear: Tensor, shape: LayerShape, row_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = row_scale.to(linear.dtype).unsqueeze(-1)
    with torch.enable_grad():
        x = linear.detach().requires_grad_()
        out = activate(x, shape)
    (grad_linear,) = torch.autograd.grad(out, x, grad_out * scale)
    out = out.detach()
    return grad_linear, out * scale, (grad_out * out).sum(-1)


def route_grad(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, shape: LayerShape) -> Tensor:
    if shape.scoring == "sparsemixer":
        return reference.route_grad(grad_weights, logits, expert_ids, scoring=shape.scoring)
    probs = torch.softmax(logits, dim=-1)
    grad = torch.zeros_like(probs).scatter_(1, expert_ids.long(), grad_weights)
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))


def router_stats(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one group."""
    counts = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=logits.shape[1]).float()
    return (
        counts[None],
        torch.softmax(logits, dim=-1).sum(0, True),
        torch.logsumexp(logits, dim=-1).square().sum()[None],
    )


def router_stats_grad(grad_prob_sums: Tensor, grad_z_sums: Tensor, logits: Tensor) -> Tensor:
    """Of one group."""
    probs, lse = torch.softmax(logits, dim=-1), torch.logsumexp(logits, dim=-1, keepdim=True)
    return probs * (grad_prob_sums - (grad_prob_sums * probs).sum(-1, keepdim=True) + 2 * lse * grad_z_sums)


def eager_loop(x: LayerInputs, shape: LayerShape) -> Run:
    def run() -> Tensor:
        weights = x.routing_weights.to(x.hidden.dtype)
        out = torch.zeros_like(x.hidden)
        for e in torch.unique(x.expert_ids).tolist():
            tokens, slots = (x.expert_ids == e).nonzero(as_tuple=True)
            y = F.linear(x.hidden[tokens], x.up_weight[e], None if x.up_bias is None else x.up_bias[e])
            y = activate(y, shape)
            y = F.linear(y, x.down_weight[e], None if x.down_bias is None else x.down_bias[e])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out

    return run


def grouped_mm_layer(x: LayerInputs, shape: LayerShape) -> Run:
    """torch._grouped_mm twice, on rows gathered in expert order; no host synchronisation. Without biases only."""
    plan = ops.plan(x.expert_ids, shape.num_experts)
    token_of_row = plan.token_of_row.long()
    row_of_slot = plan.row_of_slot.long()
    ends = plan.expert_offsets[1:]

    def run() -> Tensor:
        up, down = x.up_weight.transpose(1, 2), x.down_weight.transpose(1, 2)
        weights = x.routing_weights.to(x.hidden.dtype)
        inner = activate(torch._grouped_mm(x.hidden[token_of_row], up, offs=ends), shape)
        return unpermute(torch._grouped_mm(inner, down, offs=ends), row_of_slot, weights)

    return run


def batched_matmul(weight: Tensor, num_rows: int) -> Run:
    """A product [E, rows, K] x [E, K, M] of as many FLOPs, every expert with the same number of rows."""
    a = torch.randn(weight.shape[0], max(num_rows // weight.shape[0], 1), weight.shape[2], device=weight.device)
    a, b = a.to(weight.dtype), weight.transpose(1, 2)
    return lambda: torch.bmm(a, b)
