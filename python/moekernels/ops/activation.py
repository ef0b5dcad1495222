from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops._call import call
from moekernels.ops._float64 import in_float64, is_float64

# Every activation of the kernels, as torch computes it. csrc/torch/checks.cpp has the same names.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)


@dataclass(frozen=True)
class Swiglu:
    """An activation for gated projections, with bounds: what gpt-oss, DeepSeek-V4 and others compute.

    With ``g = min(gate, limit)`` and ``v = min(max(value, -limit), limit)`` it is
    ``g * sigmoid(alpha * g) * (v + shift)``. What lies beyond a bound has no gradient; what is equal to it has, as with
    torch's clamp up to 2.13 (2.14 gives it none). The defaults are "silu". gpt-oss has
    ``Swiglu(alpha=1.702, limit=7, shift=1, interleaved=True)``.

    Attributes:
        alpha: the factor in the sigmoid.
        limit: more than 0.
        shift: added to the value.
        interleaved: gate and value of a column are neighbours, ``[gate 0, value 0, gate 1, ...]``, instead of all gates
            coming first. In a grouped GEMM that takes a pass of its own.

    Raises:
        ValueError: `limit` is not more than 0, or a number is NaN or, but for `limit`, infinite.
    """

    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"Swiglu: limit must be more than 0, got {self.limit}")
        for name in ("alpha", "shift"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"Swiglu: {name} must be finite, got {getattr(self, name)}")

    def __call__(self, linear: Tensor) -> Tensor:
        """``[..., 2F] -> [..., F]``, as torch computes it."""
        gate, value = (linear[..., ::2], linear[..., 1::2]) if self.interleaved else linear.chunk(2, dim=-1)
        # Not clamp, whose gradient at a bound depends on the version of torch.
        gate, value = (torch.where(x > self.limit, self.limit, x) for x in (gate, value))
        value = torch.where(value < -self.limit, -self.limit, value)
        return gate * torch.sigmoid(self.alpha * gate) * (value + self.shift)

    def __str__(self) -> str:
        """As the registered ops take it."""
        return f"swiglu({float(self.alpha)},{float(self.limit)},{float(self.shift)},{int(self.interleaved)})"


def activation(linear: Tensor, activation: str | Swiglu, *, gated: bool = False) -> Tensor:
    """Apply an activation, or a gate: what :func:`grouped_gemm` does with its sums, by itself.

    Args:
        linear: ``[N, F]``, or ``[N, 2F]`` when gated, the gate's columns first; float32, bfloat16 or float16.
        activation: one of :data:`ACTIVATIONS`; ``"gelu"`` is the exact one, ``"gelu_tanh"`` the approximation,
            ``"relu2"`` the square of ``"relu"``. Or, gated, a :class:`Swiglu`.
        gated: compute ``activation(gate) * value``.

    Returns:
        ``[N, F]`` in the dtype of ``linear``, computed in float32.

    Raises:
        ValueError: for a wrong shape or dtype, or an unknown activation.
    """
    if is_float64(linear):
        return in_float64(_self, linear, activation, gated=gated)
    return call(torch.ops.moekernels.activation.default, linear, str(activation), gated)


_self = activation  # whose argument has its name
