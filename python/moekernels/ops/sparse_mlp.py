from __future__ import annotations

import torch
from torch import Tensor

from moekernels._settings import allows_tf32, is_batch_invariant
from moekernels.ops._call import autocast, call, check_plain, is_transformed, run, wants_gradient
from moekernels.ops._expert_weights import ExpertTensors, tensor_list
from moekernels.ops._float64 import in_float64, is_float64
from moekernels.ops._quantized import is_quantized
from moekernels.ops._types import Plan
from moekernels.ops.activation import Swiglu
from moekernels.ops.grouped_gemm import grouped_gemm
from moekernels.ops.permute import unpermute


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
    zero_unvisited: bool = False,
) -> Tensor:
    """Send each token through its experts and sum their weighted outputs: a whole MoE layer after the routing.

    The same as :func:`permute`, :func:`grouped_gemm` up, :func:`grouped_gemm` down and :func:`unpermute`, as one op
    whose up-projection gathers its own rows. Under autocast the hidden states, weights and biases are cast first.

    For a gradient this keeps, besides its arguments, the up-projection before its activation: ``T * K * 2F`` elements
    when gated, ``T * K * F`` when not.

    Args:
        hidden: ``[T, H]``, float32, bfloat16 or float16.
        routing_weights: ``[T, K]`` float32.
        plan: which token goes where.
        up_weight: ``[E, 2F, H]`` when gated (gate rows first), else ``[E, F, H]``; same dtype. Or a sequence of
            ``E * P`` matrices, expert slowest, the rows of an expert's P parts following one another: gated ``2 * E``
            of ``[F, H]``, each gate before its value, or ``E`` of ``[2F, H]``; else ``E`` of ``[F, H]``. They may lie
            anywhere with any strides, and nothing is copied but a matrix whose rows are not dense. Either weight may be
            quantised, whatever its dtype; then there is a gradient of all else.
        down_weight: ``[E, H, F]``, same dtype; or a sequence likewise.
        up_bias: ``[E, 2F]`` or ``[E, F]``, same dtype; or as many vectors as `up_weight` has matrices.
        down_bias: ``[E, H]``, same dtype; or as many vectors as `down_weight` has matrices.
        activation: one of :data:`ACTIVATIONS`; or, gated, a :class:`Swiglu`.
        gated: whether the up-projection holds a gate.
        zero_unvisited: whether the matrices and vectors of an expert without rows get a gradient of zeros. By default
            they get none on the CPU, as where a model leaves the expert out, and zeros where only the device knows the
            number of rows, in compiled code, and of a stack.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``; zero for a token all of whose choices were dropped.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, or an unknown activation.
    """
    if is_quantized(up_weight) or is_quantized(down_weight):
        offsets = plan.expert_offsets
        inner = grouped_gemm(
            hidden, up_weight, offsets, bias=up_bias, activation=activation, gated=gated,
            token_of_row=plan.token_of_row, zero_unvisited=zero_unvisited,
        )  # fmt: skip
        rows = grouped_gemm(inner, down_weight, offsets, bias=down_bias, zero_unvisited=zero_unvisited)
        return unpermute(rows, plan.row_of_slot, routing_weights)
    up, down, of_up, of_down = (tensor_list(x) for x in (up_weight, down_weight, up_bias, down_bias))
    check_plain("sparse_mlp", up_weight=up, down_weight=down, up_bias=of_up, down_bias=of_down)
    hidden, up, down, of_up, of_down = autocast(hidden, up, down, of_up, of_down)
    if is_float64(hidden):
        return in_float64(
            sparse_mlp, hidden, routing_weights, plan, up_weight, down_weight, up_bias=up_bias, down_bias=down_bias,
            activation=activation, gated=gated,
        )  # fmt: skip
    arguments = (
        hidden,
        routing_weights,
        plan.expert_offsets,
        plan.token_of_row,
        plan.row_of_slot,
        up,
        down,
        of_up,
        of_down,
        str(activation),
        gated,
        not hidden.is_cpu and allows_tf32(),
        is_batch_invariant(),
    )
    if is_transformed() or wants_gradient(hidden, routing_weights, *up, *down, *of_up, *of_down):
        out, _ = call(torch.ops.moekernels.sparse_mlp_train.default, *arguments, zero_unvisited)
        return out
    return run(torch.ops.moekernels.sparse_mlp.default, *arguments)
