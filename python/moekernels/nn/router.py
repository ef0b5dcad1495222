"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops


class Routing(NamedTuple):
    """What a router decides. T tokens, E experts, K choices per token.

    Attributes:
        logits: ``[T, E]``, in the dtype of the router's weight, or in that of autocast.
        expert_weights: ``[T, K]`` float32.
        expert_ids: ``[T, K]`` int32, -1 where a token is not routed.
    """

    logits: Tensor
    expert_weights: Tensor
    expert_ids: Tensor


class TopKRouter(nn.Module):
    """A linear layer without bias, then :func:`moekernels.ops.route`.

    Args:
        hidden_size: width of a token.
        num_experts: number of experts.
        top_k: experts per token.
        scoring: the scoring rule of :func:`moekernels.ops.route`.
        renormalize: divide the chosen weights by their sum.
        epsilon: half the width of a near-tie in the "sparsemixer" rule.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = False,
        epsilon: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"TopKRouter: top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.top_k = top_k
        self.scoring = scoring
        self.renormalize = renormalize
        self.epsilon = epsilon
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Routing:
        """``hidden [T, H]``, optional ``mask [T]`` (tokens with 0 are not routed) -> :class:`Routing`."""
        logits = F.linear(hidden, self.weight)
        expert_weights, expert_ids = ops.route(
            logits, self.top_k, scoring=self.scoring, renormalize=self.renormalize, epsilon=self.epsilon, mask=mask
        )
        return Routing(logits, expert_weights, expert_ids)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, scoring={self.scoring!r}"
