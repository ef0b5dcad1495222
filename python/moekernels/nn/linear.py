"""A linear layer that is fast where PyTorch's is not: on a CPU, with few rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from moekernels import ops
from moekernels._settings import autocast_dtype

# Private to torch: where it is missing, there may always be one.
_has_any_global_hook: Callable[[], bool] = getattr(torch_module, "_has_any_global_hook", lambda: True)


class Linear(nn.Linear):
    """`torch.nn.Linear`, with the same parameters and, up to rounding, the same result.

    In inference on a CPU, few rows are multiplied by :func:`moekernels.ops.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def activated(layer: nn.Module, activation: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``activation(layer(input))``, without a pass over memory in between where nobody looks there.

    A rectifier gives the same bits before rounding as after it. Hooks, and whatever has taken the place of a
    :class:`Linear` or of its `forward`, are called as ever.
    """
    if activation is F.relu and type(layer) is Linear and not _is_watched(layer):
        return ops.linear(input, layer.weight, layer.bias, activation="relu")
    return activation(layer(input))


def _is_watched(layer: nn.Module) -> bool:
    """Whether calling `layer` does more than its class says. A tracer is to see it called, too."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or _has_any_global_hook()
        or torch.compiler.is_compiling()
    )


def linear_in(dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` in `dtype`, whatever that of the arguments or of autocast."""
    # The context costs as much as the product of one token.
    is_on = autocast_dtype(input.device) is not None
    with torch.autocast(input.device.type, enabled=False) if is_on else nullcontext():
        return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
