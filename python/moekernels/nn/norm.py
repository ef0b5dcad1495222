"""Root-mean-square layer normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels import ops


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (arXiv 1910.07467), accumulated in float32.

    Args:
        hidden_size: size of the normalised last dimension.
        eps: added to the mean square.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` -> the same shape, in the dtype of the weight."""
        weight = self.weight
        if hidden.dtype != weight.dtype:
            hidden = hidden.to(weight.dtype)
        return ops.rms_norm(hidden, weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
