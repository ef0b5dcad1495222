"""Every kernel that only training needs, at the sizes it has in a layer, beside the same step in plain PyTorch.

Rows are in expert order. A projection has two gradients: that of its rows, another grouped GEMM by the same weight, and
that of its weight, a product over each expert's rows. See moekernels.bench.kernels for the roofs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moekernels import ops
from moekernels.bench import baselines as plain
from moekernels.bench import check
from moekernels.bench.case import Case, size_of
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.bench.table import BOUND
from moekernels.ops import reference

_OF_ROWS = ("unpermute-grad", "activation", "activation-grad")
_OF_ROUTERS = ("router-stats", "router-stats-grad", "route-grad")
_OF_PRODUCTS = ("down-rows-grad", "down-weight-grad", "up-rows-grad", "up-weight-grad")
BACKWARD = (*_OF_ROWS, *_OF_ROUTERS, *_OF_PRODUCTS)

_kernels = torch.ops.moekernels


def row_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    """The activation, which stands alone here, and the gradients of it and of the un-permutation."""
    plan = ops.plan(x.expert_ids, shape.num_experts)
    num_rows, dtype, device = x.expert_ids.numel(), x.hidden.dtype, x.hidden.device
    row_of_slot, token_of_row = plan.row_of_slot.long(), plan.token_of_row

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    grad_out, rows, weights = randn(*x.hidden.shape), randn(num_rows, shape.hidden_size), x.routing_weights
    yield Case(
        "unpermute-grad",
        lambda: _kernels.unpermute_grad(grad_out, rows, plan.row_of_slot, token_of_row, weights, True),
        {plain.EAGER: lambda: plain.unpermute_grad(grad_out, rows, row_of_slot, weights)},
        size_of(grad_out, rows, rows, plan.row_of_slot, token_of_row, weights, weights),
        definition=lambda dtype: reference.unpermute_grad(
            grad_out.to(dtype), rows.to(dtype), plan.row_of_slot, weights.to(check.accumulator(dtype))
        ),
        terms=lambda: {1: check.largest_norm(grad_out.double()[token_of_row] * rows.double())},
    )

    grad_inner, linear = randn(num_rows, shape.ffn_size), randn(num_rows, shape.up_features)
    scale = torch.rand(num_rows, device=device)
    act, gated, offsets = shape.activation, shape.gated, plan.expert_offsets
    yield Case(
        "activation",
        lambda: ops.activation(linear, act, gated=gated),
        {plain.EAGER: lambda: plain.activate(linear, shape)},
        size_of(linear) * (1.5 if gated else 2),
        definition=lambda dtype: reference.activation(linear.to(dtype), act, gated=gated),
    )
    yield Case(
        "activation-grad",
        lambda: _kernels.activation_grad(grad_inner, linear, act, gated, scale, offsets),
        {plain.EAGER: lambda: plain.activation_grad(grad_inner, linear, shape, scale)},
        size_of(grad_inner, grad_inner, linear, linear, scale, scale),
        definition=lambda dtype: reference.activation_grad(
            grad_inner.to(dtype), linear.to(dtype), act, gated=gated,
            row_scale=scale.to(check.accumulator(dtype)), expert_offsets=offsets,
        ),
        terms=lambda: {
            2: check.largest_norm(grad_inner.double() * reference.activation(linear.double(), act, gated=gated))
        },
    )  # fmt: skip


def router_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    """The sums of the auxiliary losses, the gradient of these, and that of the choices."""
    weights, device = x.routing_weights, x.hidden.device
    # In float32, where no two are equal: of equal ones PyTorch may choose any.
    logits, grad_weights = torch.randn(weights.shape[0], shape.num_experts, device=device), torch.randn_like(weights)
    yield Case(
        "router-stats",
        lambda: ops.router_stats(logits, shape.top_k),
        {plain.EAGER: lambda: plain.router_stats(logits, shape.top_k)},
        size_of(logits),
        definition=lambda dtype: reference.router_stats(logits.to(dtype), shape.top_k),
    )
    grad_probs, grad_z = torch.linspace(-1, 1, shape.num_experts, device=device)[None], torch.ones(1, device=device)
    yield Case(
        "router-stats-grad",
        lambda: _kernels.router_stats_grad(grad_probs, grad_z, logits),
        {plain.EAGER: lambda: plain.router_stats_grad(grad_probs, grad_z, logits)},
        size_of(logits, logits),
        definition=lambda dtype: reference.router_stats_grad(grad_probs.to(dtype), grad_z.to(dtype), logits.to(dtype)),
    )

    _, chosen = ops.route(logits, shape.top_k, scoring=shape.scoring)
    yield Case(
        "route-grad",
        lambda: _kernels.route_grad(grad_weights, logits, chosen, shape.scoring),
        {plain.EAGER: lambda: plain.route_grad(grad_weights, logits, chosen, shape)},
        size_of(logits, logits, weights, chosen),
        definition=lambda dtype: reference.route_grad(
            grad_weights.to(dtype), logits.to(dtype), chosen, scoring=shape.scoring
        ),
    )


def gemm_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    num_rows, touched = x.expert_ids.numel(), torch.unique(x.expert_ids).numel()
    offsets, ends = plan.expert_offsets, plan.expert_offsets[1:]
    inner = torch.randn(num_rows, shape.ffn_size, device=x.hidden.device).to(x.hidden.dtype)

    def both(name: str, weight: Tensor, rows: Tensor, token_of_row: Tensor | None) -> Iterator[Case]:
        grad_rows = torch.randn(num_rows, weight.shape[1], device=weight.device).to(weight.dtype)
        flops = 2.0 * num_rows * weight.shape[1] * weight.shape[2]
        bounds = {BOUND: plain.batched_matmul(weight, num_rows)} if num_rows >= shape.num_experts else {}
        out_bytes = num_rows * weight.shape[2] * weight.element_size()

        def in_order() -> Tensor:
            return rows if token_of_row is None else rows[token_of_row.long()]

        yield Case(
            f"{name}-rows-grad",
            lambda: ops.grouped_gemm(grad_rows, weight, offsets, transposed=True),
            {
                plain.EAGER: lambda: plain.grouped_gemm(grad_rows, weight.transpose(1, 2), offsets),
                plain.GROUPED_MM: lambda: torch._grouped_mm(grad_rows, weight, offs=ends),
            },
            size_of(grad_rows) + touched * size_of(weight[0]) + out_bytes,
            flops,
            bounds,
            lambda dtype: check.grouped_gemm(grad_rows, weight, plan, dtype, transposed=True),
        )
        yield Case(
            f"{name}-weight-grad",
            lambda: ops.grouped_weight_grad(grad_rows, rows, offsets, token_of_row=token_of_row)[0],
            {
                plain.EAGER: lambda: plain.grouped_weight_grad(grad_rows, in_order(), offsets),
                plain.GROUPED_MM: lambda: torch._grouped_mm(grad_rows.T, in_order(), offs=ends),
            },
            size_of(grad_rows, rows, weight),
            flops,
            bounds,
            lambda dtype: reference.grouped_weight_grad(
                grad_rows.to(dtype), rows.to(dtype), offsets, token_of_row=token_of_row
            )[0],
        )

    yield from both("down", x.down_weight, inner, None)
    yield from both("up", x.up_weight, x.hidden, plan.token_of_row)


def cases(x: LayerInputs, shape: LayerShape, kernels: Sequence[str] = BACKWARD) -> Iterator[Case]:
    """Those of the kernels."""
    for make, names in ((row_cases, _OF_ROWS), (router_cases, _OF_ROUTERS), (gemm_cases, _OF_PRODUCTS)):
        if set(names) & set(kernels):
            yield from (case for case in make(x, shape) if case.name in kernels)
