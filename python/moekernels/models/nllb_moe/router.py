"""The router: two experts for a token, within the experts' capacities.

Letters: B batch, S tokens of a sequence, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.models.nllb_moe.config import TOP_K, NllbMoeConfig
from moekernels.nn import RouterOutput
from moekernels.nn.batch import LOCAL, Batch
from moekernels.nn.linear import project_in


class NllbMoeTop2Router(nn.Module):
    """Chooses two experts for a token: the first by probability, the second by logit among the others.

    An expert has a capacity, counted over the whole batch: all first choices find their places before any second
    choice. There is no guarantee that a token reaches an expert. The capacity depends on the batch alone; nothing of an
    evaluation is carried over to training.
    """

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_capacity = config.expert_capacity
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.router_ignore_padding_tokens = config.router_ignore_padding_tokens
        self.dtype: torch.dtype = getattr(torch, config.router_dtype)
        self.second_expert_policy = config.second_expert_policy
        self.normalize_router_prob_before_dropping = config.normalize_router_prob_before_dropping
        self.batch_prioritized_routing = config.batch_prioritized_routing
        self.moe_eval_capacity_token_fraction = config.moe_eval_capacity_token_fraction
        self.batch: Batch = LOCAL

    @overload
    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, *, dense: Literal[True] = True
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, *, dense: Literal[False]
    ) -> RouterOutput: ...

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, *, dense: bool = True
    ) -> tuple[Tensor, Tensor] | RouterOutput:
        """Route ``hidden_states [B, S, H]`` of ``T = B * S`` tokens.

        Args:
            hidden_states: the tokens.
            padding_mask: see :meth:`route_tokens`.
            dense: return the matrices of :meth:`route_tokens`; otherwise what a sparse layer wants, with an expert id
                of -1 where a choice found no place.
        """
        # In the router's dtype, whatever that of the weights or of autocast.
        logits = project_in(self.dtype, self.classifier, hidden_states).flatten(0, -2)
        if dense:
            return self.route_tokens(logits, hidden_states.dtype, padding_mask)
        return RouterOutput(logits, *self._route(logits, hidden_states.dtype, padding_mask))

    def route_tokens(
        self, router_logits: Tensor, input_dtype: torch.dtype = torch.float32, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Assign tokens to experts, as dense matrices. `router_logits` is not changed.

        Args:
            router_logits: ``[T, E]``.
            input_dtype: of the hidden states, and of the result; probabilities are rounded to it before they are
                compared.
            padding_mask: ``[T]``, nonzero at padding; or the additive ``[B, 1, Q, keys]`` of a full attention pass.

        Returns:
            One-hot first choices int64 ``[T, E]``, without those that were dropped, and the weights ``[T, E]``.
        """
        routing_weights, expert_ids = self._route(router_logits, input_dtype, padding_mask)
        # A choice without a place goes to a column that is cut off.
        columns = expert_ids.masked_fill(expert_ids < 0, self.num_experts).long()
        shape = (router_logits.shape[0], self.num_experts + 1)
        routing_weights = routing_weights.to(input_dtype)
        router_probs = routing_weights.new_zeros(shape).scatter(1, columns, routing_weights)[:, :-1]
        top_1_mask = torch.zeros(shape, dtype=torch.int64, device=columns.device).scatter(1, columns[:, :1], 1)[:, :-1]
        return top_1_mask, router_probs

    def _route(self, router_logits: Tensor, input_dtype: torch.dtype, padding_mask: Tensor | None) -> ops.Routing:
        """:meth:`route_tokens` as weights float32 ``[T, 2]`` and expert ids int32 ``[T, 2]``, -1 without a place."""
        num_tokens = router_logits.shape[0]
        mask = noise = None
        if padding_mask is not None and not self.router_ignore_padding_tokens:
            mask = not_padding(padding_mask, num_tokens)[-num_tokens:]
        if self.second_expert_policy == "sampling":
            zero = torch.zeros((), device=router_logits.device)
            noise = torch.distributions.Gumbel(zero, zero + 1).sample(router_logits.shape)
        weights, expert_ids = ops.route(
            router_logits, TOP_K, scoring="top2_gate", probs_dtype=input_dtype, noise=noise, mask=mask
        )
        probability = weights
        smallest = torch.finfo(input_dtype).eps
        if self.normalize_router_prob_before_dropping:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
        if self.second_expert_policy == "random":
            second = probability[:, 1]
            is_taken = 2 * second > torch.rand_like(second)
            expert_ids = torch.stack((expert_ids[:, 0], expert_ids[:, 1].masked_fill(~is_taken, -1)), dim=1)
            # As transformers 4.56.2 has it: this policy's second weight is never normalised beforehand.
            weights = torch.stack((weights[:, 0], second), dim=1)
        expert_ids = self._claim_places(expert_ids, probability[:, 0].detach())
        if not self.normalize_router_prob_before_dropping:
            weights = weights * (expert_ids >= 0)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
        return ops.Routing(weights, expert_ids)

    def _claim_places(self, expert_ids: Tensor, priority: Tensor) -> Tensor:
        """``expert_ids [T, 2]`` with -1 where the expert is full; `priority` ``[T]`` is looked at if it decides."""
        by_priority = (priority,) if self.batch_prioritized_routing else ()
        (everyones, *priorities), begin = self.batch.gather(expert_ids, *by_priority)
        capacity = self._capacity(everyones.shape[0])
        if capacity is None:
            return expert_ids
        plan = ops.plan(everyones, self.num_experts, capacity=capacity, priority=next(iter(priorities), None))
        own = plan.row_of_slot[begin : begin + expert_ids.shape[0]]
        return expert_ids.masked_fill(own < 0, -1)

    def _capacity(self, num_tokens: int) -> int | None:
        """Tokens that an expert takes; None where that is all there are."""
        fraction = self.moe_eval_capacity_token_fraction
        if not self.training and fraction > 0:
            capacity = math.ceil(fraction * num_tokens)
        elif self.expert_capacity is not None:
            capacity = self.expert_capacity
        else:
            capacity = 2 * math.ceil(num_tokens / self.num_experts)
        return capacity if capacity < num_tokens else None


def not_padding(padding_mask: Tensor, num_tokens: int) -> Tensor:
    """Which tokens are not padding, bool ``[T]``, from the masks that transformers passes to a sparse layer."""
    hidden = padding_mask[:, 0, -1] if padding_mask.dim() == 4 else padding_mask
    if hidden.numel() != num_tokens:
        raise ValueError(f"padding_mask must have one entry per token ({num_tokens}), got {list(padding_mask.shape)}")
    return ~hidden.bool().reshape(-1)
