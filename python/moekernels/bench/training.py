"""One training step of a layer after the routing: forwards, and backwards to every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekernels.bench import check
from moekernels.bench.case import Case
from moekernels.bench.clocks import Run
from moekernels.bench.layer import baselines, expert_rows, ours
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.ops import reference


def as_leaves(x: LayerInputs, frozen_experts: bool = False) -> tuple[LayerInputs, list[Tensor]]:
    """The same values as new leaves, and those that get a gradient: hidden, expert weights, both stacks, biases."""

    def leaf(tensor: Any, frozen: bool = frozen_experts) -> Any:
        return None if tensor is None else tensor.detach().requires_grad_(not frozen)

    y = replace(
        x,
        hidden=leaf(x.hidden, False),
        routing_weights=leaf(x.routing_weights, False),
        up_weight=leaf(x.up_weight),
        down_weight=leaf(x.down_weight),
        up_bias=leaf(x.up_bias),
        down_bias=leaf(x.down_bias),
    )
    tensors = (y.hidden, y.routing_weights, y.up_weight, y.down_weight, y.up_bias, y.down_bias)
    return y, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def as_step(forward: Callable[[], Any], leaves: Sequence[Tensor], direction: Tensor) -> Run:
    """Gradients of the leaves, where `direction` is that of the output."""

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(forward(), leaves, direction)

    return run


def as_backward(forward: Callable[[], Any], leaves: Sequence[Tensor], direction: Tensor) -> Run:
    """The backward pass of a step alone, each time of the same forward pass."""
    with torch.enable_grad():
        out = forward()
    return lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True)


def work(
    x: LayerInputs, shape: LayerShape, frozen_experts: bool = False, *, forward: bool = True
) -> tuple[float, float]:
    """FLOPs of a step, or of its backward pass alone: each product once forwards and, for two operands or one, twice or
    once backwards. Bytes it must move: in each pass the weights of each touched expert once, and tokens in and out;
    every gradient once."""
    passes = 2 if forward else 1
    flops = (passes if frozen_experts else passes + 1) * 2.0 * x.expert_ids.numel() * shape.expert_size
    weights = passes * torch.unique(x.expert_ids).numel() * shape.expert_size
    gradients = 0 if frozen_experts else shape.num_experts * shape.expert_size
    return flops, float(weights + gradients + 2 * passes * x.hidden.numel()) * x.hidden.element_size()


def definition(x: LayerInputs, shape: LayerShape, direction: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients that a step must find, in a dtype, expert by expert."""
    total = check.accumulator(dtype)
    grad_hidden = torch.zeros_like(x.hidden, dtype=total)
    grad_weights = torch.zeros_like(x.routing_weights, dtype=total)
    grads: list[list[Tensor]] = []
    stacks = [stack for stack in (x.up_weight, x.down_weight, x.up_bias, x.down_bias) if stack is not None]
    for e in range(shape.num_experts):
        tokens, slots = (x.expert_ids == e).nonzero(as_tuple=True)
        rows = x.hidden[tokens].to(dtype).requires_grad_()
        weights = x.routing_weights[tokens, slots].to(total).requires_grad_()
        of_expert: list[Any] = [stack[e : e + 1].to(dtype).requires_grad_() for stack in stacks]
        up, down, up_bias, down_bias = of_expert if shape.bias else (*of_expert, None, None)
        offsets = torch.tensor([0, len(tokens)])
        with torch.enable_grad():
            options: dict[str, Any] = {"activation": shape.activation, "gated": shape.gated}
            inner = reference.grouped_gemm(rows, up, offsets, bias=up_bias, **options)
            out = reference.grouped_gemm(inner, down, offsets, bias=down_bias)
            out = out.to(total) * weights.unsqueeze(-1)
        of_rows, of_weights, *of_stacks = torch.autograd.grad(
            out, (rows, weights, *of_expert), direction[tokens].to(total)
        )
        grad_hidden.index_add_(0, tokens, of_rows.to(total))
        grad_weights[tokens, slots] = of_weights
        grads.append([grad[0] for grad in of_stacks])
    return [grad_hidden.to(dtype), grad_weights, *(torch.stack(stack) for stack in zip(*grads, strict=True))]


def terms(x: LayerInputs, shape: LayerShape, direction: Tensor) -> dict[int, float]:
    """Of the gradients of the expert weights, each a product of two long vectors."""
    rows, plan = expert_rows(x, shape, x.expert_ids, torch.float64)
    return {1: check.largest_norm(rows * direction.double()[plan.token_of_row])}


def step_case(x: LayerInputs, shape: LayerShape) -> Case:
    leaves_of_x, leaves = as_leaves(x)
    direction = torch.randn_like(x.hidden)
    flops, num_bytes = work(x, shape)
    return Case(
        "layer forward+backward",
        as_step(ours(leaves_of_x, shape), leaves, direction),
        {name: as_step(run, leaves, direction) for name, run in baselines(leaves_of_x, shape).items()},
        num_bytes,
        flops,
        definition=lambda dtype: definition(x, shape, direction, dtype),
        terms=lambda: terms(x, shape, direction),
        roundings=3,  # that of the products, and before it of what a kernel hands to the next: at most two
    )
