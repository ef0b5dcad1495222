"""Gradients: what each op saves, and the registered ops that its backward pass is made of.

Nothing here looks at data, so a backward pass can be traced, and nothing waits for the device. A gradient is a sum in a
fixed order: no two runs differ. Of gradients themselves there are no gradients; asking for one is an error.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekernels.ops._call import Operators
from moekernels.ops._expert_weights import BIAS, WEIGHT, ExpertGrads, expert_grads, stacked
from moekernels.ops._transforms import loop, register

_ops = Operators()


def _register(op: str, setup_context: Any, backward: Any) -> None:
    def trimmed_backward(ctx: Any, *grads: Tensor | None) -> Any:
        result = backward(ctx, *grads)
        return result[: len(ctx.needs_input_grad)] if isinstance(result, tuple) else result

    torch.library.register_autograd(f"moekernels::{op}", trimmed_backward, setup_context=setup_context)
    register(getattr(torch.ops.moekernels, op).default, setup_context, backward)


def _needs_grad(ctx: Any, num_inputs: int) -> list[Any]:
    """`ctx.needs_input_grad`, also of the last inputs, which the dispatcher leaves out where they are defaults."""
    return [*ctx.needs_input_grad, *[False] * num_inputs][:num_inputs]


def _split(tensors: list[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """Lists of so many tensors, from one after the other."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [tensors[end - count : end] for count, end in zip(counts, ends, strict=True)]


# --- router -----------------------------------------------------------------------------------------------------------


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, *ctx.rule, _, _ = inputs
    _, expert_ids = output
    ctx.save_for_backward(logits, expert_ids)
    ctx.mark_non_differentiable(expert_ids)
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, grad_weights: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    logits, expert_ids = ctx.saved_tensors
    grad_logits = None
    if grad_weights is not None:
        grad_logits = _ops.route_grad(grad_weights, logits, expert_ids, *ctx.rule)
    return grad_logits, None, None, None, None, None, None, None


def _setup_router_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, mask = inputs
    ctx.save_for_backward(logits, mask)
    ctx.mark_non_differentiable(output[0])


def _router_stats_backward(
    ctx: Any, _: Tensor, grad_prob_sums: Tensor, grad_z_sums: Tensor
) -> tuple[Tensor | None, ...]:
    logits, mask = ctx.saved_tensors
    return _ops.router_stats_grad(grad_prob_sums, grad_z_sums, logits, mask), None, None, None


_register("route", _setup_route, _route_backward)
_register("router_stats", _setup_router_stats, _router_stats_backward)


# --- permutation ------------------------------------------------------------------------------------------------------


def sum_copies(rows: Tensor, token_of_row: Tensor, num_tokens: int) -> Tensor:
    """``out[t] = sum of the rows whose token is t``, in the order of the rows and in float32. -> [T, H]

    The gradient of a bias is such a sum: here each token is an expert, and its rows are gathered from where they are.
    """
    if num_tokens == 0:
        return rows.new_empty(0, rows.shape[1])
    valid = (token_of_row >= 0) & (token_of_row < num_tokens)
    tokens, order = torch.sort(torch.where(valid, token_of_row, num_tokens), stable=True)
    bounds = torch.arange(num_tokens + 1, dtype=tokens.dtype, device=tokens.device)
    offsets = torch.searchsorted(tokens, bounds, out_int32=True)
    no_weight = rows.new_empty(rows.shape[0], 0)
    return _ops.grouped_weight_grad(rows, no_weight, offsets, order.int(), None, None, True, False)[1]


def _tokens_of_rows(row_of_slot: Tensor, num_rows: int) -> Tensor:
    """The token whose slot names a row; -1 for a row that none names. -> [N] int32"""
    num_tokens, top_k = row_of_slot.shape
    valid = (row_of_slot >= 0) & (row_of_slot < num_rows)
    rows = torch.where(valid, row_of_slot, num_rows).reshape(-1).long()
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=row_of_slot.device)
    # One place more than there are rows takes what has none.
    result = row_of_slot.new_full((num_rows + 1,), -1)
    return result.scatter(0, rows, tokens.unsqueeze(1).expand(-1, top_k).reshape(-1))[:num_rows]


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, token_of_row, row_of_slot = inputs
    ctx.num_tokens = hidden.shape[0]
    ctx.save_for_backward(token_of_row, row_of_slot)


def _permute_backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    token_of_row, row_of_slot = ctx.saved_tensors
    if row_of_slot is None:
        return sum_copies(grad_rows, token_of_row, ctx.num_tokens), None, None
    return _ops.unpermute(grad_rows, row_of_slot, None), None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row_of_slot, weights = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(rows if _needs_grad(ctx, 3)[2] else None, row_of_slot, weights)


def _unpermute_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, row_of_slot, weights = ctx.saved_tensors
    needs_rows, _, needs_weights = _needs_grad(ctx, 3)
    token_of_row = _tokens_of_rows(row_of_slot, ctx.num_rows)
    grad_rows, grad_weights = _ops.unpermute_grad(grad_out, rows, row_of_slot, token_of_row, weights, needs_rows)
    return grad_rows if needs_rows else None, None, grad_weights if needs_weights else None


_register("permute", _setup_permute, _permute_backward)
_register("unpermute", _setup_unpermute, _unpermute_backward)


# --- experts ----------------------------------------------------------------------------------------------------------


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    linear, *ctx.activation = inputs
    ctx.save_for_backward(linear)


def _activation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (linear,) = ctx.saved_tensors
    return _ops.activation_grad(grad_out, linear, *ctx.activation, None, None, False, False)[0], None, None


def _setup_grouped_gemm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, expert_offsets, bias, ctx.activation, ctx.gated, row_scale, token_of_row, *ctx.switches = inputs
    ctx.num_weights = len(weight)
    ctx.save_for_backward(rows, expert_offsets, row_scale, token_of_row, *weight, *bias)


def _grouped_gemm_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    rows, expert_offsets, row_scale, token_of_row, *experts = ctx.saved_tensors
    weight, bias = experts[: ctx.num_weights], experts[ctx.num_weights :]
    allow_tf32, batch_invariant, transposed, zero_unvisited = ctx.switches
    needs_rows, needs_weight, _, needs_bias, _, _, needs_scale = _needs_grad(ctx, 7)
    num_experts = expert_offsets.shape[0] - 1
    weight_grads = ExpertGrads(weight, WEIGHT, needs_weight, num_experts)
    bias_grads = ExpertGrads(bias, BIAS, needs_bias or [], num_experts)
    grad_rows = grad_scale = None

    if ctx.activation != "none" or ctx.gated or row_scale is not None:
        # What the epilogue was given is computed once more.
        linear = _ops.grouped_gemm(
            rows,
            weight,
            expert_offsets,
            bias,
            "none",
            False,
            None,
            token_of_row,
            allow_tf32,
            batch_invariant,
            transposed,
        )
        grad_linear, _, grad_scale = _ops.activation_grad(
            grad_out, linear, ctx.activation, ctx.gated, row_scale, expert_offsets, False, needs_scale
        )
    else:
        grad_linear = grad_out

    if needs_rows:
        grad_rows = _ops.grouped_gemm(
            grad_linear, weight, expert_offsets, [], "none", False, None, None,
            allow_tf32, batch_invariant, not transposed,
        )  # fmt: skip
        if token_of_row is not None:
            grad_rows = sum_copies(grad_rows, token_of_row, rows.shape[0])
    options = {"allow_tf32": allow_tf32, "zero_unvisited": zero_unvisited}
    if transposed:
        # The gradients of weight and bias sum different rows.
        no_weight, no_bias = ExpertGrads([], WEIGHT, [], num_experts), ExpertGrads([], BIAS, [], num_experts)
        grad_weight, _ = expert_grads(
            rows, grad_linear, expert_offsets, weight_grads, no_bias, grad_token_of_row=token_of_row, **options
        )
        no_rows = rows.new_empty(grad_linear.shape[0], 0)
        _, grad_bias = expert_grads(grad_linear, no_rows, expert_offsets, no_weight, bias_grads, **options)
    else:
        grad_weight, grad_bias = expert_grads(
            grad_linear, rows, expert_offsets, weight_grads, bias_grads, token_of_row=token_of_row, **options
        )
    return (
        grad_rows, grad_weight, None, grad_bias, None, None, grad_scale if needs_scale else None,
        None, None, None, None, None,
    )  # fmt: skip


_register("activation", _setup_activation, _activation_backward)
_register("grouped_gemm", _setup_grouped_gemm, _grouped_gemm_backward)


def _setup_sparse_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, up_weight, down_weight, up_bias, down_bias, ctx.activation, ctx.gated = inputs[:-3]
    ctx.switches = inputs[-3:]
    ctx.counts = (len(up_weight), len(down_weight), len(up_bias), len(down_bias))
    ctx.save_for_backward(*tensors, output[1], *up_weight, *down_weight, *up_bias, *down_bias)
    ctx.set_materialize_grads(False)


def _sparse_mlp_backward(ctx: Any, grad_out: Tensor | None, grad_linear_out: Tensor | None) -> tuple[Any, ...]:
    """From the output back through the weighted sum, the down-projection, the activation and the up-projection.

    Letters: a is a row's inner activation, w its routing weight, so out[t] = sum of w * (down_weight[e] @ a + bias).
    """
    hidden, routing_weights, expert_offsets, token_of_row, row_of_slot, linear, *experts = ctx.saved_tensors
    up_weight, down_weight, up_bias, down_bias = _split(experts, ctx.counts)
    allow_tf32, batch_invariant, zero_unvisited = ctx.switches
    needs_hidden, needs_weights, _, _, _, needs_up, needs_down, needs_up_bias, needs_down_bias = _needs_grad(ctx, 9)
    num_experts = expert_offsets.shape[0] - 1
    of_up, of_down = (
        ExpertGrads(weight, WEIGHT, needed, num_experts)
        for weight, needed in ((up_weight, needs_up), (down_weight, needs_down))
    )
    of_up_bias, of_down_bias = (
        ExpertGrads(bias, BIAS, needed or [], num_experts)
        for bias, needed in ((up_bias, needs_up_bias), (down_bias, needs_down_bias))
    )
    options = {"allow_tf32": allow_tf32, "zero_unvisited": zero_unvisited}
    grad_hidden = grad_weights = None

    def gemm(rows: Tensor, weight: list[Tensor], tokens: Tensor | None) -> Tensor:
        """The rows times the weight itself, where the forward pass multiplied with its transpose."""
        return _ops.grouped_gemm(
            rows, weight, expert_offsets, [], "none", False, None, tokens, allow_tf32, batch_invariant, True
        )

    if grad_out is None:
        grad_out = torch.zeros_like(hidden)
    ones = routing_weights.new_ones(routing_weights.shape[0], 1)
    row_weights = _ops.unpermute_grad(ones, None, row_of_slot, token_of_row, routing_weights, True)[0].view(-1)
    # The gradient of a, but for the factor w, which activation_grad puts to it.
    grad_linear, weighted_inner, grad_row_weights = _ops.activation_grad(
        gemm(grad_out, down_weight, token_of_row),
        linear,
        ctx.activation,
        ctx.gated,
        row_weights,
        expert_offsets,
        bool(of_down or of_down_bias),
        needs_weights,
    )
    if grad_linear_out is not None:
        grad_linear = grad_linear + grad_linear_out
    if needs_hidden:
        grad_hidden = _ops.unpermute(gemm(grad_linear, up_weight, None), row_of_slot, None)
    # The large gradients of the weights come last, each when as little as can be is there besides.
    grad_up, grad_up_bias = expert_grads(
        grad_linear, hidden, expert_offsets, of_up, of_up_bias, token_of_row=token_of_row, **options
    )
    del grad_linear
    grad_down, grad_down_bias = expert_grads(
        grad_out, weighted_inner, expert_offsets, of_down, of_down_bias,
        grad_token_of_row=token_of_row, bias_scale=row_weights, **options,
    )  # fmt: skip
    del weighted_inner
    if needs_weights:
        if down_bias:
            bias = stacked(down_bias, BIAS, num_experts).float().unsqueeze(1)
            of_bias = _ops.grouped_gemm(
                grad_out.float(), [bias], expert_offsets, [], "none", False, None, token_of_row, False, batch_invariant
            )
            grad_row_weights = grad_row_weights + of_bias.view(-1)
        grad_weights = _ops.permute(grad_row_weights.unsqueeze(1), row_of_slot.reshape(-1)).view_as(routing_weights)
    return (
        grad_hidden, grad_weights, None, None, None, grad_up, grad_down, grad_up_bias, grad_down_bias,
        None, None, None, None, None,
    )  # fmt: skip


_register("sparse_mlp_train", _setup_sparse_mlp, _sparse_mlp_backward)


# --- second derivatives -----------------------------------------------------------------------------------------------


def _refuse_second_derivative(op: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"moekernels: {op} is itself a gradient and cannot be differentiated again")

    _register(op, setup_context, backward)


for _op in ("route_grad", "router_stats_grad", "unpermute_grad", "activation_grad", "grouped_weight_grad"):
    _refuse_second_derivative(_op)


# --- batches ----------------------------------------------------------------------------------------------------------

for _op in (
    "route", "plan", "permute", "grouped_gemm", "unpermute", "sparse_mlp", "sparse_mlp_train", "activation",
    "router_stats", "route_grad", "router_stats_grad", "unpermute_grad", "activation_grad", "grouped_weight_grad",
):  # fmt: skip
    torch.library.register_vmap(f"moekernels::{_op}", partial(loop, getattr(torch.ops.moekernels, _op).default))
