"""The MLP of a layer: dense, or a router and experts.

Letters: B batch, S tokens of a sequence, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.models.nllb_moe.config import TOP_K, NllbMoeConfig
from moekernels.nn import GroupedExperts, Linear
from moekernels.nn.activations import activation_function, op_activation
from moekernels.nn.linear import activated, linear_in


class Top2Routing(NamedTuple):
    """Where the tokens of a batch go.

    Attributes:
        weights: ``[T, 2]`` float32, final; what an entry without a row holds has no meaning.
        expert_ids: ``[T, 2]`` int32, -1 where there is no such choice.
        plan: which row of which expert serves which choice.
    """

    weights: Tensor
    expert_ids: Tensor
    plan: ops.Plan


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

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [T, H]`` -> ``[T, E]``, computed in the router's dtype whatever that of the weights or autocast."""
        return linear_in(self.dtype, hidden, self.classifier.weight, self.classifier.bias)

    def route(self, router_logits: Tensor, input_dtype: torch.dtype, kept: Tensor | None = None) -> Top2Routing:
        """Assign tokens to experts.

        Args:
            router_logits: ``[T, E]``.
            input_dtype: of the hidden states; probabilities are rounded to it before they are compared.
            kept: ``[T]`` bool, False at padding.
        """
        noise = None
        if self.second_expert_policy == "sampling":
            zero = torch.zeros((), device=router_logits.device)
            noise = torch.distributions.Gumbel(zero, zero + 1).sample(router_logits.shape)
        mask = None if self.router_ignore_padding_tokens else kept
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
        plan = ops.plan(
            expert_ids,
            self.num_experts,
            capacity=self._capacity(router_logits.shape[0]),
            priority=probability[:, 0].detach() if self.batch_prioritized_routing else None,
        )
        if not self.normalize_router_prob_before_dropping:
            weights = weights * (plan.row_of_slot >= 0)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
        return Top2Routing(weights, expert_ids, plan)

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

    def route_tokens(
        self, router_logits: Tensor, input_dtype: torch.dtype = torch.float32, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Assign tokens to experts, as dense matrices. `router_logits` is not changed.

        Args:
            router_logits: ``[T, E]``.
            input_dtype: of the hidden states, and of the result.
            padding_mask: ``[T]``, nonzero at padding; or the additive ``[B, 1, Q, keys]`` of a full attention pass.

        Returns:
            One-hot first choices int64 ``[T, E]``, without those that were dropped, and the weights ``[T, E]``.
        """
        num_tokens = router_logits.shape[0]
        kept = _not_padding(padding_mask, num_tokens)
        routing = self.route(router_logits, input_dtype, None if kept is None else kept.reshape(-1)[-num_tokens:])
        served = routing.plan.row_of_slot >= 0
        # A choice without a row goes to a column that is cut off.
        columns = routing.expert_ids.masked_fill(~served, self.num_experts).long()
        shape = (num_tokens, self.num_experts + 1)
        weights = routing.weights.to(input_dtype)
        router_probs = weights.new_zeros(shape).scatter(1, columns, weights)[:, :-1]
        top_1_mask = torch.zeros(shape, dtype=torch.int64, device=columns.device).scatter(1, columns[:, :1], 1)[:, :-1]
        return top_1_mask, router_probs

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``hidden_states [B, S, H]`` -> what :meth:`route_tokens` returns for ``T = B * S`` tokens."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.route_tokens(self.logits(hidden), hidden_states.dtype, padding_mask)


class NllbMoeDenseActDense(nn.Module):
    """The MLP of a dense layer."""

    def __init__(self, config: NllbMoeConfig, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(config.d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, config.d_model)
        self.activation = activation_function(config.activation_function)
        self.dropout = config.activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        inner = activated(self.fc1, self.activation, hidden_states)
        return self.fc2(F.dropout(inner, self.dropout, self.training))


class NllbMoeSparseMLP(nn.Module):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        ffn_dim: inner width of one expert.
        expert_class: what an expert is; only :class:`NllbMoeDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: NllbMoeConfig, ffn_dim: int, expert_class: type[nn.Module] = NllbMoeDenseActDense
    ) -> None:
        super().__init__()
        if expert_class is not NllbMoeDenseActDense:
            raise ValueError(
                "NllbMoeSparseMLP: experts are fused, so expert_class must be NllbMoeDenseActDense, got "
                f"{expert_class.__name__}"
            )
        self.router = NllbMoeTop2Router(config)
        self.experts = GroupedExperts(
            config.d_model,
            ffn_dim,
            config.num_experts,
            activation=op_activation(config.activation_function),
            gated=False,
            bias=True,
        )
        self.moe_token_dropout = config.moe_token_dropout
        self.activation_dropout = config.activation_dropout

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            padding_mask: additive attention mask ``[B, 1, Q, keys]`` of a full pass, or ``[B * S]``, nonzero at
                padding; None or False where there is none.

        Returns:
            The output ``[B, S, H]``, zero for padding and for tokens that no expert had a place for, and the router's
            logits ``[B * S, E]``.
        """
        batch_size, num_tokens = hidden_states.shape[:2]
        kept = _not_padding(padding_mask, batch_size * num_tokens)
        return self.mix(hidden_states, kept)

    def mix(self, hidden_states: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with the tokens that are not padding, bool ``[B, S]`` or what is broadcast to it."""
        shape = hidden_states.shape
        hidden = hidden_states.reshape(-1, shape[-1])
        if kept is not None:
            kept = kept.reshape(-1) if kept.numel() == hidden.shape[0] else kept.expand(shape[:2]).reshape(-1)
        logits = self.router.logits(hidden)
        weights, _, plan = self.router.route(logits, hidden.dtype, kept)
        if self.training and (self.moe_token_dropout or self.activation_dropout):
            rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
            rows = self.experts(rows, plan.expert_offsets, self.activation_dropout)
            out = ops.unpermute(F.dropout(rows, self.moe_token_dropout), plan.row_of_slot, weights)
        else:
            out = self.experts.forward_fused(hidden, weights * (1 - self.moe_token_dropout), plan)
        return out.view(shape), logits


def _not_padding(padding_mask: Tensor | bool | None, num_tokens: int) -> Tensor | None:
    """Which tokens are not padding, bool ``[T]``, from the masks that transformers passes to this layer."""
    if not isinstance(padding_mask, Tensor):
        return None
    hidden = padding_mask[:, 0, -1] if padding_mask.dim() == 4 else padding_mask
    if hidden.numel() != num_tokens:
        raise ValueError(f"padding_mask must have one entry per token ({num_tokens}), got {list(padding_mask.shape)}")
    return ~hidden.bool().reshape(-1)
