"""Shape functions and gradients of the ops. Their schemas and kernels are C++ (csrc/torch/library.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moekernels._library  # noqa: F401  (loads the ops)
from moekernels.ops import reference
from moekernels.ops._types import Plan

# --- shapes -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("moekernels::route")
def _route_shape(logits: Tensor, top_k: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("moekernels::plan")
def _plan_shape(expert_ids: Tensor, num_experts: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = expert_ids.shape
    return (
        expert_ids.new_empty(num_experts + 1),
        expert_ids.new_empty(num_tokens * top_k),
        expert_ids.new_empty(num_tokens, top_k),
    )


@torch.library.register_fake("moekernels::permute")
def _permute_shape(hidden: Tensor, token_of_row: Tensor) -> Tensor:
    return hidden.new_empty(token_of_row.shape[0], hidden.shape[1])


@torch.library.register_fake("moekernels::grouped_gemm")
def _grouped_gemm_shape(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    transposed: bool = False,
) -> Tensor:
    num_rows = rows.shape[0] if token_of_row is None else token_of_row.shape[0]
    out_features = weight.shape[2 if transposed else 1]
    return rows.new_empty(num_rows, out_features // (2 if gated else 1))


@torch.library.register_fake("moekernels::grouped_weight_grad")
def _grouped_weight_grad_shape(
    grad_rows: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    grad_token_of_row: Tensor | None = None,
    token_of_row: Tensor | None = None,
    bias_scale: Tensor | None = None,
    need_bias: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    num_experts, out_features = expert_offsets.shape[0] - 1, grad_rows.shape[1]
    grad_weight = grad_rows.new_empty(num_experts, out_features, rows.shape[1])
    return grad_weight, grad_rows.new_empty((num_experts, out_features) if need_bias else 0)


@torch.library.register_fake("moekernels::unpermute")
def _unpermute_shape(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None = None) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@torch.library.register_fake("moekernels::sparse_mlp")
def _sparse_mlp_shape(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


# --- gradients --------------------------------------------------------------------------------------------------------


def _differentiate(op: str, definition: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Give `op` the gradient of its eager definition, which is evaluated again in the backward pass.

    Right for every op and every input, but slow; a backward kernel takes the place of this line by line.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        values = [
            next(tensors) if tensor else value for tensor, value in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                values[i] = values[i].detach().requires_grad_()
            outputs = definition(*values)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, dy) for y, dy in zip(outputs, grad_outputs, strict=True) if y.requires_grad and dy is not None]
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            [values[i] for i in wanted],
            [dy.to(y.dtype) for y, dy in pairs],
            allow_unused=True,
        )
        result: list[Tensor | None] = [None] * len(values)
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
        return tuple(result)

    torch.library.register_autograd(f"moekernels::{op}", backward, setup_context=setup_context)


def _route(logits, top_k, scoring, renormalize, probs_dtype, epsilon, noise, mask):  # type: ignore[no-untyped-def]
    return reference.route(
        logits,
        top_k,
        scoring=scoring,
        renormalize=renormalize,
        probs_dtype=probs_dtype,
        epsilon=epsilon,
        noise=noise,
        mask=mask,
    )


def _grouped_gemm(  # type: ignore[no-untyped-def]
    rows,
    weight,
    expert_offsets,
    bias,
    activation,
    gated,
    row_scale,
    token_of_row,
    allow_tf32,
    batch_invariant,
    transposed,
):
    return reference.grouped_gemm(
        rows,
        weight,
        expert_offsets,
        bias=bias,
        activation=activation,
        gated=gated,
        row_scale=row_scale,
        token_of_row=token_of_row,
        transposed=transposed,
    )


def _sparse_mlp(  # type: ignore[no-untyped-def]
    hidden,
    expert_weights,
    expert_offsets,
    token_of_row,
    row_of_slot,
    up_weight,
    down_weight,
    up_bias,
    down_bias,
    activation,
    gated,
    allow_tf32,
    batch_invariant,
):
    return reference.sparse_mlp(
        hidden,
        expert_weights,
        Plan(expert_offsets, token_of_row, row_of_slot),
        up_weight,
        down_weight,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        gated=gated,
    )


_differentiate("route", _route)
_differentiate("permute", reference.permute)
_differentiate("grouped_gemm", _grouped_gemm)
_differentiate("unpermute", reference.unpermute)
_differentiate("sparse_mlp", _sparse_mlp)
