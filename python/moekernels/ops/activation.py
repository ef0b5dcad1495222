from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._call import call

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activation(linear: Tensor, activation: str, *, gated: bool = False) -> Tensor:
    """Apply an activation, or a gate: what :func:`grouped_gemm` does with its sums, by itself.

    Args:
        linear: ``[N, F]``, or ``[N, 2F]`` when gated, the gate's columns first; float32, bfloat16 or float16.
        activation: one of :data:`ACTIVATIONS`; ``"gelu"`` is the exact one, ``"gelu_tanh"`` the approximation.
        gated: compute ``activation(gate) * value``.

    Returns:
        ``[N, F]`` in the dtype of ``linear``, computed in float32.

    Raises:
        ValueError: for a wrong shape or dtype, or an unknown activation.
    """
    return call(torch.ops.moekernels.activation.default, linear, activation, gated)
