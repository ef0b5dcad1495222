"""PhiMoE's router, which draws experts in training (SparseMixer-v2, arXiv 2409.12136)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.nn._checks import check
from moekernels.nn.router import RouterOutput, TopKRouter
from moekernels.ops.reference import near_ties

# The share of draws other than the most probable expert that count in full, and what the others count: Heun's
# third-order method.
_FULL = 0.25
_PARTIAL = 0.3333


class SparsemixerRouter(TopKRouter):
    """Two experts per token, one after the other, each weighted by a softmax over its near-ties.

    In evaluation each is the argmax: the "sparsemixer" rule of :func:`moekernels.ops.route`. In training each is drawn
    from that softmax by adding Gumbel noise, and its weight counts a third, unless it is the most probable one or a
    coin of one in four says otherwise. The gradient is that of the weight before this factor.

    PyTorch's generator is asked for the same numbers in the same order as by transformers, so a seed routes alike.

    Args:
        hidden_size, num_experts, top_k, **options: those of :class:`TopKRouter`; `top_k` is 2, `scoring` "sparsemixer".
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int = 2, *, scoring: str = "sparsemixer", **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, scoring=scoring, **options)
        check(self, "scoring", scoring, scoring == "sparsemixer", "'sparsemixer'")

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """``hidden [..., H]`` of T tokens, optional ``mask [T]`` bool: tokens with False are not routed.

        Raises:
            ValueError: `hidden` has another width.
        """
        if not self.training:
            return super().forward(hidden, mask)
        logits = self._logits(hidden)
        noise, is_full = _draw(logits)
        routing_weights, expert_ids = ops.route(
            logits,
            self.top_k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            eps=self.eps,
            noise=noise,
            mask=mask,
        )
        is_full = is_full | _is_most_probable(logits, expert_ids, self.eps)
        factor = torch.where(is_full, 1.0, _PARTIAL).to(logits.dtype)
        return RouterOutput(logits, _Scaled.apply(routing_weights, factor), expert_ids)


@torch.no_grad()
def _draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gumbel noise float32 ``[2, T, E]``, and bool ``[T, 2]``: which draws count in full, whatever they are."""
    first_noise = torch.empty_like(logits).exponential_().log()
    first_coin = torch.rand_like(logits[:, :1])
    second_noise = torch.empty_like(logits).exponential_().log()
    torch.rand_like(first_coin)  # transformers draws the second coin twice
    second_coin = torch.rand_like(first_coin)
    noise = -torch.stack((first_noise, second_noise)).float()
    return noise, torch.cat((first_coin, second_coin), dim=-1) > 1 - _FULL


@torch.no_grad()
def _is_most_probable(scores: Tensor, expert_ids: Tensor, eps: float) -> Tensor:
    """bool ``[T, 2]``: whether each expert has the largest rounded probability, the lowest index first on ties."""
    candidates = scores
    found = []
    for chosen in expert_ids.long().clamp(min=0).split(1, dim=-1):
        probs = torch.softmax(near_ties(scores, candidates, eps), dim=-1)
        found.append(probs.argmax(dim=-1, keepdim=True) == chosen)
        candidates = candidates.scatter(-1, chosen, float("-inf"))
    return torch.cat(found, dim=-1)


class _Scaled(torch.autograd.Function):
    """``weights * factor``, rounded to the dtype of the factor; the gradient is that of `weights` alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, factor: Tensor) -> Tensor:
        return (weights.to(factor.dtype) * factor).to(weights.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
