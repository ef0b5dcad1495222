"""Every op alone, at the sizes it has in a layer, beside the same step in plain PyTorch.

Timed one call at a time, on a GPU from a cold L2. The roof of route, plan, permute and unpermute is bandwidth for what
they must read and write; that of the grouped GEMMs is the nearer of bandwidth and matmul rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.bench import baselines as plain
from moekernels.bench import check
from moekernels.bench.case import Case, size_of
from moekernels.bench.clocks import Run
from moekernels.bench.shapes import LayerInputs, LayerShape, router_logits
from moekernels.bench.table import BOUND
from moekernels.ops import reference

KERNELS = ("route", "plan", "permute", "up", "down", "unpermute")


def routing_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    num_rows, experts = x.expert_ids.numel(), shape.num_experts
    # In float32, where no two are equal: of equal ones PyTorch may choose any.
    logits = router_logits(x, shape, torch.float32)
    yield Case(
        "route",
        lambda: ops.route(logits, shape.top_k, scoring=shape.scoring),
        {plain.EAGER: lambda: plain.route(logits, shape)},
        size_of(logits) + 8 * num_rows,
        definition=lambda dtype: reference.route(logits, shape.top_k, scoring=shape.scoring),
    )
    yield Case(
        "plan",
        lambda: ops.plan(x.expert_ids, experts),
        {plain.EAGER: lambda: plain.plan(x.expert_ids, experts)},
        3 * 4 * num_rows + 4 * (experts + 1),
        definition=lambda dtype: reference.plan(x.expert_ids, experts),
    )


def permute_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    token_of_row = plan.token_of_row.long()
    row_bytes = x.expert_ids.numel() * shape.hidden_size * x.hidden.element_size()
    yield Case(
        "permute",
        lambda: ops.permute(x.hidden, plan.token_of_row),
        {plain.EAGER: lambda: x.hidden[token_of_row]},
        size_of(x.hidden, plan.token_of_row) + row_bytes,
        definition=lambda dtype: reference.permute(x.hidden.to(dtype), plan.token_of_row),
    )


def unpermute_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    row_of_slot, weights = plan.row_of_slot.long(), x.routing_weights.to(x.hidden.dtype)
    rows = torch.randn(x.expert_ids.numel(), shape.hidden_size, device=x.hidden.device).to(x.hidden.dtype)
    yield Case(
        "unpermute",
        lambda: ops.unpermute(rows, plan.row_of_slot, x.routing_weights),
        {plain.EAGER: lambda: plain.unpermute(rows, row_of_slot, weights)},
        size_of(rows, x.hidden, plan.row_of_slot, x.routing_weights),
        definition=lambda dtype: reference.unpermute(rows.to(dtype), plan.row_of_slot, x.routing_weights),
    )


def gemm_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    num_rows, touched = x.expert_ids.numel(), torch.unique(x.expert_ids).numel()
    token_of_row, ends = plan.token_of_row.long(), plan.expert_offsets[1:]
    inner = torch.randn(num_rows, shape.ffn_size, device=x.hidden.device).to(x.hidden.dtype)

    def case(name: str, ours: Run, eager: Run, grouped_mm: Run, weight: Tensor, num_bytes: int) -> Case:
        found = Case(name, ours, {plain.EAGER: eager}, num_bytes + touched * size_of(weight[0]))
        found.flops = 2.0 * num_rows * weight.shape[1] * weight.shape[2]
        if not shape.bias:
            found.baselines[plain.GROUPED_MM] = grouped_mm
        if num_rows >= shape.num_experts:
            found.bounds[BOUND] = plain.batched_matmul(weight, num_rows)
        return found

    def up() -> Tensor:
        return ops.grouped_gemm(
            x.hidden,
            x.up_weight,
            plan.expert_offsets,
            bias=x.up_bias,
            activation=shape.activation,
            gated=shape.gated,
            token_of_row=plan.token_of_row,
        )

    def eager_up() -> Tensor:
        rows = plain.grouped_gemm(x.hidden[token_of_row], x.up_weight, plan.expert_offsets, x.up_bias)
        return plain.activate(rows, shape)

    def grouped_mm_up() -> Tensor:
        rows = torch._grouped_mm(x.hidden[token_of_row], x.up_weight.transpose(1, 2), offs=ends)
        return plain.activate(rows, shape)

    def up_by_definition(dtype: torch.dtype) -> Tensor:
        options: dict[str, Any] = {"activation": shape.activation, "gated": shape.gated}
        return check.grouped_gemm(x.hidden, x.up_weight, plan, dtype, bias=x.up_bias, gather=True, **options)

    def down() -> Tensor:
        return ops.grouped_gemm(inner, x.down_weight, plan.expert_offsets, bias=x.down_bias)

    def eager_down() -> Tensor:
        return plain.grouped_gemm(inner, x.down_weight, plan.expert_offsets, x.down_bias)

    def grouped_mm_down() -> Tensor:
        return torch._grouped_mm(inner, x.down_weight.transpose(1, 2), offs=ends)

    found = case("up", up, eager_up, grouped_mm_up, x.up_weight, size_of(x.hidden, inner))
    found.definition = up_by_definition
    yield found
    rows_bytes = num_rows * shape.hidden_size * x.hidden.element_size()
    found = case("down", down, eager_down, grouped_mm_down, x.down_weight, size_of(inner) + rows_bytes)
    found.definition = lambda dtype: check.grouped_gemm(inner, x.down_weight, plan, dtype, bias=x.down_bias)
    yield found


_MAKERS = (
    (routing_cases, ("route", "plan")),
    (permute_cases, ("permute",)),
    (gemm_cases, ("up", "down")),
    (unpermute_cases, ("unpermute",)),
)


def cases(x: LayerInputs, shape: LayerShape, kernels: Sequence[str] = KERNELS) -> Iterator[Case]:
    """Those of the kernels, in the order data flows."""
    for make, names in _MAKERS:
        if set(names) & set(kernels):
            yield from (case for case in make(x, shape) if case.name in kernels)
