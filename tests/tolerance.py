"""The rule for comparing a kernel with the truth."""

from __future__ import annotations

import torch
from torch import Tensor

# What may differ even where plain PyTorch happens to be exact: a few roundings of the output.
_FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_accurate(actual: Tensor, truth: Tensor, plain: Tensor, scale: float | None = None) -> None:
    """`actual` may err from `truth` (float64) at most twice as much as `plain`, PyTorch's own result in that dtype.

    The largest errors over all elements are compared. The floor is one rounding of the largest element, or of `scale`
    where the elements are sums of larger terms.
    """
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    assert actual.dtype == plain.dtype, (actual.dtype, plain.dtype)
    if actual.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    floor = _FLOOR[actual.dtype] * max(truth.abs().max().item(), scale or 0.0)
    allowed = 2 * (plain.double() - truth).abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} ({actual.dtype}, shape {tuple(actual.shape)})"
