"""The definition of every op, in plain PyTorch.

Each function here has the signature of the op of the same name in :mod:`moekernels.ops` and says in a few lines what
that op computes. They are slow, run on any device and in any floating-point dtype (float64 too), and are what the tests
hold the kernels against.

Letters: T tokens, E experts, K choices per token, N = T * K rows, H hidden size, F expert size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops._expert_weights import BIAS, WEIGHT, ExpertTensors, stacked, tensor_list
from moekernels.ops._types import Plan, Routing
from moekernels.ops.activation import ACTIVATION_FUNCTIONS, Swiglu


def _activate(x: Tensor, activation: str | Swiglu, gated: bool) -> Tensor:
    if isinstance(activation, Swiglu):
        return activation(x)
    act = ACTIVATION_FUNCTIONS[activation]
    if not gated:
        return act(x)
    gate, value = x.chunk(2, dim=-1)
    return act(gate) * value


def _accumulator(x: Tensor) -> Tensor:
    """`x` in the dtype sums are kept in: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of each row, the lowest index first on ties; NaN counts as the largest."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype | None = None,
    eps: float = 0.01,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    if scoring == "softmax":
        weights, expert_ids = _softmax_top_k(logits, top_k, probs_dtype)
    elif scoring == "top2_gate":
        weights, expert_ids = _top2_gate(logits, probs_dtype, noise)
    elif scoring == "sparsemixer":
        weights, expert_ids = _sparsemixer(logits, eps, noise)
    else:
        raise ValueError(f"unknown scoring {scoring!r}")
    weights = _accumulator(weights)
    if renormalize:
        smallest = torch.finfo(probs_dtype or torch.float32).eps if scoring == "top2_gate" else 0.0
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=smallest)
    if mask is not None:
        routed = mask.bool().unsqueeze(-1)
        weights = weights.masked_fill(~routed, 0.0)
        expert_ids = expert_ids.masked_fill(~routed, -1)
    return Routing(weights, expert_ids.int())


def _softmax_top_k(logits: Tensor, top_k: int, probs_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """OLMoE (arXiv 2409.02060) and, with top_k = 1, Switch Transformers (arXiv 2101.03961)."""
    logits = _accumulator(logits)
    probs = torch.softmax(logits, dim=-1)
    if probs_dtype in (None, torch.float32):
        # Ordered by logit: the same order, but one that rounding of the probabilities cannot disturb.
        expert_ids = _largest(logits, top_k)
    else:
        probs = probs.to(probs_dtype)
        expert_ids = _largest(probs, top_k)
    return probs.gather(-1, expert_ids), expert_ids


def _top2_gate(logits: Tensor, probs_dtype: torch.dtype | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """NLLB-MoE's gate: the first expert by rounded probability, the second by (noisy) logit among the others."""
    logits = _accumulator(logits)
    probs = torch.softmax(logits, dim=-1)
    if probs_dtype is not None:
        probs = probs.to(probs_dtype)
    first = _largest(probs, 1)
    candidates = logits if noise is None else logits + noise
    # Everything but the first expert, so that a row of -inf still yields a second one.
    order = _largest(candidates, 2)
    second = torch.where(order[:, :1] == first, order[:, 1:], order[:, :1])
    expert_ids = torch.cat([first, second], dim=-1)
    return probs.gather(-1, expert_ids), expert_ids


def near_ties(scores: Tensor, candidates: Tensor, eps: float) -> Tensor:
    """The candidates, with -inf for those more than ``2 * eps``, relative to their score, below the largest."""
    maximum = candidates.amax(dim=-1, keepdim=True)
    factor = torch.maximum(scores.abs(), maximum)
    return candidates.masked_fill((maximum - scores) / factor > 2 * eps, float("-inf"))


def _sparsemixer(scores: Tensor, eps: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """PhiMoE's routing (arXiv 2409.12136), in the dtype of the scores throughout."""

    def pick(candidates: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        near = near_ties(scores, candidates, eps)
        noisy = candidates if noise is None else (_accumulator(near) + noise).to(scores.dtype)
        expert_id = _largest(noisy, 1)
        return torch.softmax(near, dim=-1).gather(-1, expert_id), expert_id

    first_noise, second_noise = (None, None) if noise is None else noise
    first_weight, first = pick(scores, first_noise)
    second_weight, second = pick(scores.scatter(-1, first, float("-inf")), second_noise)
    return torch.cat([first_weight, second_weight], dim=-1), torch.cat([first, second], dim=-1)


def route_grad(
    grad_weights: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype | None = None,
    eps: float = 0.01,
) -> Tensor:
    """For the choice made; what was rounded counts as rounded, but rounding passes gradients on unchanged."""
    chosen = expert_ids >= 0
    ids = expert_ids.long().clamp(min=0)
    if scoring == "sparsemixer":
        others = logits.scatter(-1, ids[:, :1], float("-inf"))
        kept = [near_ties(logits, candidates, eps) for candidates in (logits, others)]
        probs = torch.softmax(_accumulator(torch.stack(kept, dim=1)), dim=-1)
        probs_dtype = logits.dtype
    else:
        probs = torch.softmax(_accumulator(logits), dim=-1).unsqueeze(1).expand(-1, ids.shape[1], -1)
    prob = probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    grad = torch.where(chosen, grad_weights.to(prob.dtype), 0.0)
    if renormalize:
        rounded = torch.where(chosen, prob if probs_dtype is None else prob.to(probs_dtype).to(prob.dtype), 0.0)
        total = rounded.sum(dim=-1, keepdim=True)
        smallest = torch.finfo(probs_dtype or torch.float32).eps if scoring == "top2_gate" else 0.0
        mean = (grad * rounded).sum(dim=-1, keepdim=True) / total
        grad = torch.where(total < smallest, grad / smallest if smallest else grad, (grad - mean) / total)
    is_chosen = F.one_hot(ids, logits.shape[-1]).to(prob.dtype)
    grad_logits = ((grad * prob).unsqueeze(-1) * (is_chosen - probs)).sum(dim=1)
    return torch.where(chosen.any(dim=-1, keepdim=True), grad_logits, 0.0).to(logits.dtype)


def router_stats(
    logits: Tensor, top_k: int, *, num_groups: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _accumulator(logits)
    choices = torch.zeros_like(logits).scatter(-1, _largest(logits, top_k), 1.0)

    def total(values: Tensor) -> Tensor:
        if mask is not None:
            weight = mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
            values = torch.where(weight == 0, 0.0, values * weight)
        return values.unflatten(0, (num_groups, -1)).sum(dim=1)

    z = torch.logsumexp(logits, dim=-1).square()
    return total(choices), total(torch.softmax(logits, dim=-1)), total(z)


def router_stats_grad(
    grad_prob_sums: Tensor, grad_z_sums: Tensor, logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    x = _accumulator(logits)
    probs, lse = torch.softmax(x, dim=-1), torch.logsumexp(x, dim=-1, keepdim=True)
    group_size = logits.shape[0] // grad_prob_sums.shape[0]
    of_probs = grad_prob_sums.repeat_interleave(group_size, dim=0)
    of_z = grad_z_sums.repeat_interleave(group_size, dim=0).unsqueeze(-1)
    grad = probs * (of_probs - (of_probs * probs).sum(dim=-1, keepdim=True) + 2 * lse * of_z)
    if mask is not None:
        weight = mask.to(grad.dtype).unsqueeze(-1)
        grad = torch.where(weight == 0, 0.0, grad * weight)
    return grad.to(logits.dtype)


def plan(
    expert_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    group_size: int | None = None,
    priority: Tensor | None = None,
) -> Plan:
    num_tokens, top_k = expert_ids.shape
    group_size = max(num_tokens, 1) if group_size is None else group_size
    order = range(num_tokens) if priority is None else torch.argsort(priority, descending=True, stable=True).tolist()
    ids = expert_ids.tolist()

    # Who keeps a place: within a group, all first choices before any second choice.
    kept = [[0 <= e < num_experts for e in row] for row in ids]
    claimed: dict[tuple[int, int], int] = {}
    for k in range(top_k):
        for t in order:
            if kept[t][k] and capacity is not None:
                place = claimed.get((t // group_size, ids[t][k]), 0)
                claimed[t // group_size, ids[t][k]] = place + 1
                kept[t][k] = place < capacity

    # Rows by expert, then by token, then by slot.
    slots = sorted((ids[t][k], t, k) for t in range(num_tokens) for k in range(top_k) if kept[t][k])
    expert_offsets = [0] * (num_experts + 1)
    token_of_row = [-1] * (num_tokens * top_k)
    row_of_slot = [[-1] * top_k for _ in range(num_tokens)]
    for row, (e, t, k) in enumerate(slots):
        expert_offsets[e + 1] += 1
        token_of_row[row] = t
        row_of_slot[t][k] = row
    for e in range(num_experts):
        expert_offsets[e + 1] += expert_offsets[e]

    def index(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=expert_ids.device)

    return Plan(index(expert_offsets), index(token_of_row), index(row_of_slot).view(num_tokens, top_k))


def permute(hidden: Tensor, token_of_row: Tensor, row_of_slot: Tensor | None = None) -> Tensor:
    valid = (token_of_row >= 0) & (token_of_row < hidden.shape[0])
    if hidden.shape[0] == 0:
        return hidden.new_zeros(token_of_row.shape[0], hidden.shape[1])
    rows = hidden[token_of_row.long().clamp(0, hidden.shape[0] - 1)]
    return torch.where(valid.unsqueeze(-1), rows, rows.new_zeros(()))


def grouped_gemm(
    rows: Tensor,
    weight: ExpertTensors,
    expert_offsets: Tensor,
    *,
    bias: ExpertTensors | None = None,
    activation: str | Swiglu = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    if token_of_row is not None:
        rows = permute(rows, token_of_row)
    offsets = expert_offsets.tolist()
    num_experts = len(offsets) - 1
    weight = stacked(tensor_list(weight), WEIGHT, num_experts)
    bias = None if bias is None else stacked(tensor_list(bias), BIAS, num_experts)
    if transposed:
        weight = weight.transpose(1, 2)
    outputs = []
    for e in range(weight.shape[0]):
        y = _accumulator(rows[offsets[e] : offsets[e + 1]]) @ _accumulator(weight[e]).T
        if bias is not None:
            y = y + _accumulator(bias[e])
        outputs.append(_activate(y, activation, gated))
    width = weight.shape[1] // (2 if gated else 1)
    outputs.append(_accumulator(rows).new_zeros(rows.shape[0] - offsets[-1], width))
    out = torch.cat(outputs)
    if row_scale is not None:
        out = torch.where(
            torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) < offsets[-1],
            out * row_scale.to(out.dtype).unsqueeze(-1),
            out,
        )
    return out.to(rows.dtype)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers of -127 ... 127 and what they are multiples of: ``[..., K]`` in their dtype and ``[..., 1]``.

    The largest magnitude of a row becomes 127; half-way is rounded to the even one. It is what rows are multiplied as
    with weights whose format has ``activations="int8"``; with a threshold, the rest of :func:`split_outliers`.
    """
    wide = _accumulator(rows)
    largest = wide.abs().amax(dim=-1, keepdim=True)
    # Not 127 / largest, which torch rounds twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
    return (wide * inverse).round().nan_to_num(0.0).to(rows.dtype), largest / 127


def split_outliers(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """What of rows is rounded beside a threshold, and what stands out: rows that add up to `rows`, zero in turn.

    Elements of a magnitude of `threshold` and more stand out; none do where it is 0. They are multiplied as they are.
    """
    stands_out = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    return rows.masked_fill(stands_out, 0), rows.masked_fill(~stands_out, 0)


def grouped_weight_grad(
    grad_rows: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    *,
    grad_token_of_row: Tensor | None = None,
    token_of_row: Tensor | None = None,
    bias_scale: Tensor | None = None,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    grads = _accumulator(grad_rows if grad_token_of_row is None else permute(grad_rows, grad_token_of_row))
    inputs = _accumulator(rows if token_of_row is None else permute(rows, token_of_row))
    scaled = grads if bias_scale is None else grads * bias_scale.to(grads.dtype).unsqueeze(-1)
    offsets = expert_offsets.tolist()
    of_expert = [slice(begin, end) for begin, end in pairwise(offsets)]
    grad_weight = torch.stack([grads[e].T @ inputs[e] for e in of_expert]).to(rows.dtype)
    if not need_bias:
        return grad_weight, grad_weight.new_empty(0)
    return grad_weight, torch.stack([scaled[e].sum(dim=0) for e in of_expert]).to(rows.dtype)


def unpermute(rows: Tensor, row_of_slot: Tensor, routing_weights: Tensor | None = None) -> Tensor:
    num_tokens, top_k = row_of_slot.shape
    out = _accumulator(rows).new_zeros(num_tokens, rows.shape[1])
    for k in range(top_k):
        taken = permute(_accumulator(rows), row_of_slot[:, k])
        if routing_weights is not None:
            kept = (row_of_slot[:, k] >= 0).unsqueeze(-1)
            taken = torch.where(kept, taken * routing_weights[:, k, None].to(taken.dtype), taken)
        out = out + taken
    return out.to(rows.dtype)


def unpermute_grad(
    grad_out: Tensor, rows: Tensor, row_of_slot: Tensor, routing_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    grad = _accumulator(grad_out)
    grad_rows = grad.new_zeros(rows.shape)
    grad_weights = grad.new_zeros(row_of_slot.shape)
    for k in range(row_of_slot.shape[1]):
        slots = row_of_slot[:, k]
        kept = (slots >= 0).nonzero().squeeze(-1)
        weight = grad.new_ones(len(kept)) if routing_weights is None else routing_weights[kept, k].to(grad.dtype)
        grad_rows[slots[kept].long()] += weight.unsqueeze(-1) * grad[kept]
        grad_weights[:, k] = (permute(_accumulator(rows), slots) * grad).sum(dim=-1)
    return grad_rows.to(rows.dtype), grad_weights


def activation(linear: Tensor, activation: str | Swiglu, *, gated: bool = False) -> Tensor:
    return _activate(_accumulator(linear), activation, gated).to(linear.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    biases = None if bias is None else _accumulator(bias)
    return _activate(F.linear(_accumulator(input), _accumulator(weight), biases), activation, False).to(input.dtype)


def rms_norm(input: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    wide = _accumulator(input)
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (_accumulator(weight) * (wide * scale)).to(input.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    shared, heads_per_key = query.shape[0] // max(key.shape[0], 1), query.shape[1] // max(key.shape[1], 1)
    key, value = (
        _accumulator(x).repeat_interleave(shared, dim=0).repeat_interleave(heads_per_key, dim=1) for x in (key, value)
    )
    scores = _accumulator(query) @ key.transpose(2, 3) * scale
    if bias is not None:
        bias = bias if bias.shape[0] in (1, scores.shape[0]) else bias.repeat_interleave(shared, dim=0)
        scores = scores + bias
    probs = scores.softmax(dim=-1)
    return (probs @ value).transpose(1, 2).flatten(2).to(query.dtype)


def activation_grad(
    grad_out: Tensor,
    linear: Tensor,
    activation: str | Swiglu,
    *,
    gated: bool = False,
    row_scale: Tensor | None = None,
    expert_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_out` is the gradient of ``row_scale * activation(linear)``, but for the factor `row_scale`."""
    with torch.enable_grad():
        x = _accumulator(linear).detach().requires_grad_()
        out = _activate(x, activation, gated)
    grad = grad_out.to(out.dtype)
    scale = grad.new_ones(linear.shape[0], 1) if row_scale is None else row_scale.to(grad.dtype).unsqueeze(-1)
    (grad_linear,) = torch.autograd.grad(out, x, scale * grad)
    out = out.detach()
    rows = torch.arange(linear.shape[0], device=linear.device).unsqueeze(-1)
    used = rows >= 0 if expert_offsets is None else rows < expert_offsets[-1]
    return (
        torch.where(used, grad_linear, 0.0).to(linear.dtype),
        torch.where(used, scale * out, 0.0).to(linear.dtype),
        torch.where(used, grad * out, 0.0).sum(dim=-1),
    )


def sparse_mlp(
    hidden: Tensor,
    routing_weights: Tensor,
    plan: Plan,
    up_weight: ExpertTensors,
    down_weight: ExpertTensors,
    *,
    up_bias: ExpertTensors | None = None,
    down_bias: ExpertTensors | None = None,
    activation: str | Swiglu = "silu",
    gated: bool = True,
) -> Tensor:
    inner = grouped_gemm(
        hidden,
        up_weight,
        plan.expert_offsets,
        bias=up_bias,
        activation=activation,
        gated=gated,
        token_of_row=plan.token_of_row,
    )
    rows = grouped_gemm(inner, down_weight, plan.expert_offsets, bias=down_bias)
    return unpermute(rows, plan.row_of_slot, routing_weights)
