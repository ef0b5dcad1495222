"""The MLP of a layer: dense, or a router and experts.

Letters: B batch, S tokens of a sequence, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.models.switch_transformers.config import SwitchTransformersConfig, activation_and_gate
from moekernels.nn import GroupedExperts, Linear
from moekernels.nn.activations import activation_function, op_activation
from moekernels.nn.linear import activated, linear_in


class Top1Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        logits: ``[B, S, E]``, in the router's dtype.
        weights: ``[T, 1]`` float32, the probability of each token's expert.
        expert_ids: ``[T, 1]`` int32, -1 where a token is not routed.
        plan: who finds a place.
    """

    logits: Tensor
    weights: Tensor
    expert_ids: Tensor
    plan: ops.Plan


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

    def route(self, hidden_states: Tensor, kept: Tensor | None = None) -> Top1Routing:
        """Route ``[B, S, H]``; `kept` is bool ``[B, S]``, or what is broadcast to it, False at padding."""
        batch_size, num_tokens, _ = hidden_states.shape
        logits = self._logits(hidden_states)
        mask = None
        if kept is not None and self.ignore_padding_tokens:
            mask = kept.expand(batch_size, num_tokens).reshape(-1)
        in_float32 = self.dtype == torch.float32
        # Probabilities are compared as the tokens' dtype can tell them apart.
        weights, expert_ids = ops.route(
            logits.reshape(-1, self.num_experts),
            1,
            probs_dtype=hidden_states.dtype if in_float32 else self.dtype,
            mask=mask,
        )
        if not in_float32:
            weights = weights.to(hidden_states.dtype).float()
        # What no sequence can overflow needs no count.
        limits = (self.expert_capacity, num_tokens) if self.expert_capacity < num_tokens else (None, None)
        plan = ops.plan(expert_ids, self.num_experts, capacity=limits[0], group_size=limits[1])
        return Top1Routing(logits, weights, expert_ids, plan)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            # Of the router's input alone: the experts get the tokens as they are.
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        return linear_in(self.dtype, hidden, self.classifier.weight, self.classifier.bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``hidden_states [B, S, H]`` -> one-hot experts int64 ``[B, S, E]``, all zero where a token found no place,
        their probabilities ``[B, S, 1]``, and the logits ``[B, S, E]``."""
        routing = self.route(hidden_states)
        # A token without a row goes to a column that is cut off.
        columns = routing.expert_ids.masked_fill(routing.plan.row_of_slot < 0, self.num_experts).long()
        one_hot = columns.new_zeros(columns.shape[0], self.num_experts + 1).scatter(1, columns, 1)[:, :-1]
        shape = hidden_states.shape[:2]
        weights = routing.weights.to(hidden_states.dtype)
        return one_hot.reshape(*shape, self.num_experts), weights.view(*shape, 1), routing.logits


class SwitchTransformersDenseActDense(nn.Module):
    """The MLP of a dense layer: ``wo(act(wi(x)))``, or ``wo(act(wi_0(x)) * wi_1(x))`` with a gate."""

    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        activation, self.gated = activation_and_gate(config.dense_act_fn)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, Linear(config.d_model, config.d_ff, bias=False))
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.activation = activation_function(activation)
        self.dropout = config.dropout_rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        if self.gated:
            inner = self.activation(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            inner = activated(self.wi, self.activation, hidden_states)
        return self.wo(F.dropout(inner, self.dropout, self.training))


class SwitchTransformersSparseMLP(nn.Module):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        expert_class: what an expert is; only :class:`SwitchTransformersDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: SwitchTransformersConfig, expert_class: type[nn.Module] = SwitchTransformersDenseActDense
    ) -> None:
        super().__init__()
        if expert_class is not SwitchTransformersDenseActDense:
            raise ValueError(
                "SwitchTransformersSparseMLP: experts are fused, so expert_class must be "
                f"SwitchTransformersDenseActDense, got {expert_class.__name__}"
            )
        activation, gated = activation_and_gate(config.dense_act_fn)
        self.router = SwitchTransformersTop1Router(config)
        self.experts = GroupedExperts(
            config.d_model, config.d_ff, config.num_experts, activation=op_activation(activation), gated=gated
        )
        self.dropout = config.dropout_rate

    def forward(self, hidden_states: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            kept: bool ``[B, S]``, False at padding; only looked at if the router ignores padding.

        Returns:
            The output ``[B, S, H]``, zero for tokens whose expert had no place for them, and the router's logits
            ``[B, S, E]``.
        """
        shape = hidden_states.shape
        logits, weights, _, plan = self.router.route(hidden_states, kept)
        hidden = hidden_states.reshape(-1, shape[-1])
        if self.training and self.dropout:
            rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
            rows = self.experts(rows, plan.expert_offsets, self.dropout)
            out = ops.unpermute(rows, plan.row_of_slot, weights)
        else:
            out = self.experts.forward_fused(hidden, weights, plan)
        return out.view(shape), logits
