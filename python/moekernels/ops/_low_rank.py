"""A layer's experts with products of low rank beside their weights, as LoRA has them (arXiv 2106.09685).

The weights are frozen, so that a backward pass needs of the rows what that of :func:`sparse_mlp` needs, the
up-projection before its activation, and two times R numbers for each. Factors that do not lie as kernels read them are
copied where they are used, once forwards and once backwards, and not kept.

Letters: T tokens, N rows, E experts, R the rank, H hidden size, F expert size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekernels._settings import autocast_dtype
from moekernels.ops import reference
from moekernels.ops._call import KERNEL_DTYPES, Operators
from moekernels.ops._float64 import is_float64
from moekernels.ops._quantized import is_quantized
from moekernels.ops._types import Plan
from moekernels.ops.activation import Swiglu
from moekernels.ops.activation import activation as activate
from moekernels.ops.grouped_gemm import grouped_gemm
from moekernels.ops.grouped_weight_grad import grouped_weight_grad
from moekernels.ops.permute import permute, unpermute

_ops = Operators()

_ADDED_BYTES = 8 << 20  # of a product that is added at a time


class LowRank(NamedTuple):
    """What is added to the product of an expert's rows: ``scale * (rows @ first[e].T) @ second[e]``.

    Attributes:
        first: ``[E, R, in]``, of any strides and any floating dtype.
        second: ``[E, R, out]``, likewise.
        scale: see above.
    """

    first: Tensor
    second: Tensor
    scale: float

    def reduce(self, rows: Tensor, expert_offsets: Tensor, token_of_row: Tensor | None = None) -> Tensor:
        """``scale * rows @ first[e].T``. -> [N, R]"""
        return _reduced(rows, self.first, self.scale, expert_offsets, token_of_row)

    def expand(self, reduced: Tensor, expert_offsets: Tensor) -> Tensor:
        """``reduced @ second[e]``. -> [N, out]"""
        return grouped_gemm(reduced, _as_read(self.second, reduced.dtype), expert_offsets, transposed=True)


def adapted_mlp(
    hidden: Tensor,
    routing_weights: Tensor,
    plan: Plan,
    weights: Sequence[Tensor],
    biases: Sequence[Any],
    adapters: Sequence[LowRank | None],
    *,
    activation: str | Swiglu,
    gated: bool,
    transposed: bool,
) -> Tensor:
    """:func:`sparse_mlp` of frozen weights with `adapters` of both projections. -> [T, H]

    Args:
        hidden: ``[T, H]``, of the dtype of the weights; under autocast both are cast first.
        routing_weights: ``[T, K]`` float32.
        plan: which token goes where.
        weights: of the up and the down-projection, stacks; without a gradient, as the biases.
        biases: ``[E, out]``.
        adapters: of each projection.
        activation: what lies between.
        gated: whether the up-projection holds a gate.
        transposed: whether the stacks are ``[E, in, out]``.
    """
    if (dtype := autocast_dtype(hidden.device)) is not None:
        hidden = hidden.to(dtype)
        weights, biases = (
            [x if x is None or is_quantized(x) else x.to(dtype) for x in pair] for pair in (weights, biases)
        )
    factors: list[Any] = []
    for adapter in adapters:
        factors += (None, None, 1.0) if adapter is None else adapter
    return _AdaptedMlp.apply(hidden, routing_weights, *plan, *weights, *biases, *factors, activation, gated, transposed)


class _AdaptedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        routing_weights: Tensor,
        expert_offsets: Tensor,
        token_of_row: Tensor,
        row_of_slot: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        up_first: Tensor | None,
        up_second: Tensor | None,
        up_scale: float,
        down_first: Tensor | None,
        down_second: Tensor | None,
        down_scale: float,
        activation: str | Swiglu,
        gated: bool,
        transposed: bool,
    ) -> Tensor:
        linear = grouped_gemm(
            hidden, up_weight, expert_offsets, bias=up_bias, token_of_row=token_of_row, transposed=transposed
        )
        up_reduced = _reduced(hidden, up_first, up_scale, expert_offsets, token_of_row)
        _add(linear, up_reduced, up_second, expert_offsets)
        inner = activate(linear, activation, gated=gated)
        rows = grouped_gemm(inner, down_weight, expert_offsets, bias=down_bias, transposed=transposed)
        down_reduced = _reduced(inner, down_first, down_scale, expert_offsets)
        _add(rows, down_reduced, down_second, expert_offsets)
        ctx.save_for_backward(
            hidden, routing_weights, expert_offsets, token_of_row, row_of_slot, up_weight, down_weight, down_bias,
            up_first, up_second, down_first, down_second, linear, up_reduced, down_reduced,
        )  # fmt: skip
        ctx.scales, ctx.activation, ctx.gated, ctx.transposed = (up_scale, down_scale), activation, gated, transposed
        return unpermute(rows, row_of_slot, routing_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | float | None, ...]:
        """As the backward pass of :func:`sparse_mlp`, with the gradients of factors in place of those of weights.

        A large gradient is made when as little as can be is there besides.
        """
        (
            hidden, routing_weights, expert_offsets, token_of_row, row_of_slot, up_weight, down_weight, down_bias,
            up_first, up_second, down_first, down_second, linear, up_reduced, down_reduced,
        ) = ctx.saved_tensors  # fmt: skip
        _let_go(ctx)
        needs_hidden, needs_weights = ctx.needs_input_grad[:2]
        up_scale, down_scale = ctx.scales
        grad_hidden = grad_weights = None
        grad_out = grad_out.contiguous()

        ones = routing_weights.new_ones(routing_weights.shape[0], 1)
        row_weights = _ops.unpermute_grad(ones, None, row_of_slot, token_of_row, routing_weights, True)[0].view(-1)
        grad_down_reduced = _reduced(grad_out, down_second, down_scale, expert_offsets, token_of_row)
        grad_inner = grouped_gemm(
            grad_out, down_weight, expert_offsets, token_of_row=token_of_row, transposed=not ctx.transposed
        )
        _add(grad_inner, grad_down_reduced, down_first, expert_offsets)
        # But for the factor that a row's routing weight is.
        grad_linear, weighted_inner, grad_row_weights = _activation_grad(
            grad_inner, linear, ctx.activation, ctx.gated, row_weights, expert_offsets,
            down_first is not None, needs_weights,
        )  # fmt: skip
        del grad_inner, linear
        grad_down_first = _factor_grad(grad_down_reduced, weighted_inner, down_first, expert_offsets)
        del weighted_inner
        if down_reduced is not None:
            down_reduced = (down_reduced * row_weights.unsqueeze(1)).to(down_reduced.dtype)
        grad_down_second = _factor_grad(down_reduced, grad_out, down_second, expert_offsets, token_of_row)

        grad_up_reduced = _reduced(grad_linear, up_second, up_scale, expert_offsets)
        if needs_hidden:
            grad_rows = grouped_gemm(grad_linear, up_weight, expert_offsets, transposed=not ctx.transposed)
            _add(grad_rows, grad_up_reduced, up_first, expert_offsets)
            grad_hidden = unpermute(grad_rows, row_of_slot)
            del grad_rows
        grad_up_second = _factor_grad(up_reduced, grad_linear, up_second, expert_offsets)
        del grad_linear
        grad_up_first = _factor_grad(grad_up_reduced, hidden, up_first, expert_offsets, token_of_row)

        if needs_weights:
            if down_bias is not None:
                bias = down_bias.to(grad_row_weights.dtype).unsqueeze(1)
                of_bias = grouped_gemm(grad_out.to(bias.dtype), bias, expert_offsets, token_of_row=token_of_row)
                grad_row_weights = grad_row_weights + of_bias.view(-1)
            grad_weights = permute(grad_row_weights.unsqueeze(1), row_of_slot.reshape(-1)).view_as(routing_weights)
            grad_weights = grad_weights.to(routing_weights.dtype)
        return (
            grad_hidden, grad_weights, None, None, None, None, None, None, None,
            grad_up_first, grad_up_second, None, grad_down_first, grad_down_second, None, None, None, None,
        )  # fmt: skip


def _let_go(ctx: Any) -> None:
    """Leave saved tensors to the backward pass alone, so that they are free where it needs them no more.

    Without this its node holds them to the end. Where the graph is to be kept torch does nothing.
    """
    release = getattr(ctx, "maybe_clear_saved_tensors", None)  # where torch has it
    if release is not None and not torch.compiler.is_compiling():
        release()


def _as_read(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``[E, R, width]`` in this dtype with dense rows, as they are if they are so.

    PEFT's `lora_B` has its experts in neighbouring columns: a matrix to be transposed.
    """
    factor = factor.to(dtype)
    if factor.stride(-1) == 1:
        return factor
    num_experts, rank, _ = factor.shape
    rows = factor.transpose(0, 1).flatten(0, 1)  # [R * E, width]
    rows = _ops.transpose(rows.t()) if rows.is_cpu and dtype in KERNEL_DTYPES else rows.contiguous()
    return rows.unflatten(0, (rank, num_experts)).transpose(0, 1)


def _reduced(
    rows: Tensor, factor: Any, scale: float, expert_offsets: Tensor, token_of_row: Tensor | None = None
) -> Any:
    """``scale * rows @ factor[e].T``, as few numbers as the factor has rows."""
    if factor is None:
        return None
    product = grouped_gemm(rows, _as_read(factor, rows.dtype), expert_offsets, token_of_row=token_of_row)
    return product if scale == 1.0 else product * scale


def _add(out: Tensor, reduced: Tensor | None, factor: Tensor | None, expert_offsets: Tensor) -> None:
    """``out += reduced @ factor[e]``, on a CPU some rows after others: their products are still in the cache."""
    if reduced is None or factor is None:
        return
    factor = _as_read(factor, out.dtype)
    num_rows = out.shape[0]
    at_once = not out.is_cpu or torch.compiler.is_compiling()
    size = num_rows if at_once else max(_ADDED_BYTES // (out.shape[1] * out.element_size()), 1)
    if num_rows <= size:
        out += grouped_gemm(reduced, factor, expert_offsets, transposed=True)
        return
    for begin in range(0, num_rows, size):
        end = min(begin + size, num_rows)
        offsets = expert_offsets.clamp(begin, end) - begin
        out[begin:end] += grouped_gemm(reduced[begin:end], factor, offsets, transposed=True)


def _factor_grad(
    reduced: Tensor | None,
    rows: Tensor,
    factor: Tensor | None,
    expert_offsets: Tensor,
    token_of_row: Tensor | None = None,
) -> Tensor | None:
    """``reduced[e's rows].T @ rows[e's rows]``, laid out for the views that the factor is. -> [E, R, width]"""
    if reduced is None or factor is None:
        return None
    grad, _ = grouped_weight_grad(reduced, rows, expert_offsets, token_of_row=token_of_row)
    if factor.stride(-1) != 1:
        num_experts, rank, _ = grad.shape
        order = torch.arange(num_experts * rank, dtype=torch.int32, device=grad.device)
        order = order.view(num_experts, rank).t().reshape(-1)
        grad = permute(grad.flatten(0, 1), order).unflatten(0, (rank, num_experts)).transpose(0, 1)
    return grad.to(factor.dtype)


def _activation_grad(
    grad_out: Tensor,
    linear: Tensor,
    activation: str | Swiglu,
    gated: bool,
    row_scale: Tensor,
    expert_offsets: Tensor,
    with_scaled: bool,
    with_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if is_float64(linear):
        return reference.activation_grad(
            grad_out, linear, activation, gated=gated, row_scale=row_scale, expert_offsets=expert_offsets
        )
    return _ops.activation_grad(
        grad_out, linear, str(activation), gated, row_scale, expert_offsets, with_scaled, with_grad_scale
    )
