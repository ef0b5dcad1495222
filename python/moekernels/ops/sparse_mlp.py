from __future__ import annotations

import torch
from torch import Tensor

from moekernels._settings import is_batch_invariant
from moekernels.ops._call import autocast, call, wants_gradient
from moekernels.ops._types import Plan


def sparse_mlp(
    hidden: Tensor,
    expert_weights: Tensor,
    plan: Plan,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """Send each token through its experts and sum their weighted outputs: a whole MoE layer after the routing.

    The same as :func:`permute`, :func:`grouped_gemm` up, :func:`grouped_gemm` down and :func:`unpermute`, as one op
    whose up-projection gathers its own rows. Under autocast the hidden states, weights and biases are cast first.

    For a gradient this keeps, besides its arguments, the up-projection before its activation: ``T * K * 2F`` elements
    when gated, ``T * K * F`` when not.

    Args:
        hidden: ``[T, H]``, float32, bfloat16 or float16.
        expert_weights: ``[T, K]`` float32.
        plan: which token goes where.
        up_weight: ``[E, 2F, H]`` when gated (gate rows first), else ``[E, F, H]``; same dtype.
        down_weight: ``[E, H, F]``, same dtype.
        up_bias: ``[E, 2F]`` or ``[E, F]``, same dtype.
        down_bias: ``[E, H]``, same dtype.
        activation: one of :data:`ACTIVATIONS`.
        gated: whether the up-projection holds a gate.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``; zero for a token all of whose choices were dropped.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, or an unknown activation.
    """
    hidden, up_weight, down_weight, up_bias, down_bias = autocast(hidden, up_weight, down_weight, up_bias, down_bias)
    arguments = (
        hidden,
        expert_weights,
        plan.expert_offsets,
        plan.token_of_row,
        plan.row_of_slot,
        up_weight,
        down_weight,
        up_bias,
        down_bias,
        activation,
        gated,
        torch.backends.cuda.matmul.allow_tf32,
        is_batch_invariant(),
    )
    if wants_gradient(hidden, expert_weights, up_weight, down_weight, up_bias, down_bias):
        out, _ = call(torch.ops.moekernels.sparse_mlp_train.default, *arguments)
        return out
    return call(torch.ops.moekernels.sparse_mlp.default, *arguments)
