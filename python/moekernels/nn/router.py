"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels._settings import autocast_dtype
from moekernels.nn._checks import check, check_counts, check_one_of, check_share

#: The rules that choose a number of experts of their own.
_TOP_2 = ("top2_gate", "sparsemixer")


class RouterOutput(NamedTuple):
    """What a router decides. T tokens, E experts, K choices per token.

    Attributes:
        logits: ``[T, E]``, in the dtype of the router's weight, or in that of autocast.
        routing_weights: ``[T, K]`` float32.
        expert_ids: ``[T, K]`` int32, -1 where a token is not routed.
    """

    logits: Tensor
    routing_weights: Tensor
    expert_ids: Tensor


class TopKRouter(nn.Module):
    """A linear layer without bias, then :func:`moekernels.ops.route`.

    Args:
        hidden_size: width of a token.
        num_experts: number of experts.
        top_k: experts per token.
        scoring: the scoring rule of :func:`moekernels.ops.route`.
        renormalize: divide the chosen weights by their sum.
        eps: half the width of a near-tie in the "sparsemixer" rule.

    Raises:
        ValueError: a size is not positive, there is no such rule, or it does not choose `top_k` experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = False,
        eps: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(self, hidden_size=hidden_size, num_experts=num_experts)
        check_one_of(self, "scoring", scoring, ops.SCORINGS)
        fits = isinstance(top_k, int) and 1 <= top_k <= num_experts
        check(self, "top_k", top_k, fits, f"between 1 and num_experts ({num_experts})")
        if scoring in _TOP_2:
            check(self, "top_k", top_k, top_k == 2, f"2, which is what {scoring} chooses")
        check_share(self, "eps", eps, float("inf"))
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring = scoring
        self.renormalize = renormalize
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """``hidden [..., H]`` of T tokens, optional ``mask [T]`` bool: tokens with False are not routed.

        Raises:
            ValueError: `hidden` has another width.
        """
        logits = self._logits(hidden)
        routing_weights, expert_ids = ops.route(
            logits, self.top_k, scoring=self.scoring, renormalize=self.renormalize, eps=self.eps, mask=mask
        )
        return RouterOutput(logits, routing_weights, expert_ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` -> ``[T, E]``."""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: hidden must be [..., {self.hidden_size}], got {list(hidden.shape)}"
            )
        weight = self.weight
        if hidden.dtype != weight.dtype and autocast_dtype(hidden.device) is None:
            hidden = hidden.to(weight.dtype)
        return F.linear(hidden if hidden.dim() == 2 else hidden.reshape(-1, self.hidden_size), weight)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"scoring={self.scoring!r}"
        )
