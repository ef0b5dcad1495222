"""A linear layer that is fast where PyTorch's is not: on a CPU, with few rows."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels._settings import autocast_dtype


class Linear(nn.Linear):
    """`torch.nn.Linear`, with the same parameters and, up to rounding, the same result.

    In inference on a CPU, few rows are multiplied by :func:`moekernels.ops.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def linear_in(dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` in `dtype`, whatever that of the arguments or of autocast."""
    # The context costs as much as the product of one token.
    is_on = autocast_dtype(input.device) is not None
    with torch.autocast(input.device.type, enabled=False) if is_on else nullcontext():
        return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
