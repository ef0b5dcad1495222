"""The router: one expert for a token, within the experts' capacities.

Letters: B batch, S tokens of a sequence, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.nn import RouterOutput
from moekernels.nn.linear import project_in


class SwitchTransformersTop1Router(nn.Module):
    """Sends each token to its most probable expert, and within a sequence the first `expert_capacity` of an expert
    find a place.

    Args:
        config: of the model.
    """

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_capacity = config.expert_capacity
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.jitter_noise = config.router_jitter_noise
        self.ignore_padding_tokens = config.router_ignore_padding_tokens
        self.dtype: torch.dtype = getattr(torch, config.router_dtype)

    @overload
    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, *, dense: Literal[True] = True
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, *, dense: Literal[False]) -> RouterOutput: ...

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, *, dense: bool = True
    ) -> tuple[Tensor, Tensor, Tensor] | RouterOutput:
        """Route ``hidden_states [B, S, H]`` of ``T = B * S`` tokens.

        Args:
            hidden_states: the tokens.
            mask: bool ``[T]``, False at padding; only looked at if the router ignores padding.
            dense: return matrices; otherwise what a sparse layer wants, with an expert id of -1 for a token that found
                no place. The logits are ``[B, S, E]`` all the same.

        Returns:
            One-hot experts int64 ``[B, S, E]``, all zero where a token found no place, their probabilities
            ``[B, S, 1]``, and the logits ``[B, S, E]``. Or a :class:`RouterOutput`.
        """
        logits = self._logits(hidden_states)
        routing_weights, expert_ids = self._route(logits, hidden_states.dtype, mask)
        if not dense:
            return RouterOutput(logits, routing_weights, expert_ids)
        # A token without a place goes to a column that is cut off.
        columns = expert_ids.masked_fill(expert_ids < 0, self.num_experts).long()
        one_hot = columns.new_zeros(columns.shape[0], self.num_experts + 1).scatter(1, columns, 1)[:, :-1]
        probs = routing_weights.to(hidden_states.dtype).view(*hidden_states.shape[:2], 1)
        return one_hot.reshape(logits.shape), probs, logits

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """``[B, S, H]`` -> ``[B, S, E]``, in the router's dtype whatever that of the weights or of autocast."""
        if self.training and self.jitter_noise > 0:
            # Of the router's input alone: the experts get the tokens as they are.
            hidden_states = hidden_states.to(self.dtype)
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        return project_in(self.dtype, self.classifier, hidden_states)

    def _route(self, logits: Tensor, input_dtype: torch.dtype, mask: Tensor | None) -> ops.Routing:
        """``logits [B, S, E]`` -> the probability float32 ``[T, 1]`` and the expert's id ``[T, 1]``, -1 without a
        place."""
        in_float32 = self.dtype == torch.float32
        # Probabilities are compared as the tokens' dtype can tell them apart.
        weights, expert_ids = ops.route(
            logits.reshape(-1, self.num_experts),
            1,
            probs_dtype=input_dtype if in_float32 else self.dtype,
            mask=mask if self.ignore_padding_tokens else None,
        )
        if not in_float32:
            weights = weights.to(input_dtype).float()
        num_tokens = logits.shape[1]
        # What no sequence can overflow needs no count.
        if self.expert_capacity < num_tokens:
            plan = ops.plan(expert_ids, self.num_experts, capacity=self.expert_capacity, group_size=num_tokens)
            expert_ids = expert_ids.masked_fill(plan.row_of_slot < 0, -1)
        return ops.Routing(weights, expert_ids)
