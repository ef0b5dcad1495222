"""The MLP of a layer: dense, or a router and experts.

Letters: B batch, S tokens of a sequence, E experts, H hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.nllb_moe.config import NllbMoeConfig
from moekernels.models.nllb_moe.router import NllbMoeTop2Router, not_padding
from moekernels.nn import GroupedExperts, RouterOutput, SparseMLP
from moekernels.nn.activations import op_activation
from moekernels.nn.linear import project


class NllbMoeDenseActDense(nn.Module):
    """The MLP of a dense layer."""

    def __init__(self, config: NllbMoeConfig, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.activation = op_activation(config.activation_function)
        self.dropout = config.activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        inner = project(self.fc1, hidden_states, self.activation)
        return project(self.fc2, F.dropout(inner, self.dropout, self.training))


class NllbMoeSparseMLP(SparseMLP):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        ffn_dim: inner width of one expert.
        expert_class: what an expert is; only :class:`NllbMoeDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: NllbMoeConfig, ffn_dim: int, expert_class: type[nn.Module] = NllbMoeDenseActDense
    ) -> None:
        if expert_class is not NllbMoeDenseActDense:
            raise ValueError(
                "NllbMoeSparseMLP: experts are fused, so expert_class must be NllbMoeDenseActDense, got "
                f"{expert_class.__name__}"
            )
        experts = GroupedExperts(
            config.d_model,
            ffn_dim,
            config.num_experts,
            activation=op_activation(config.activation_function),
            gated=False,
            bias=True,
        )
        super().__init__(
            NllbMoeTop2Router(config),
            experts,
            dropout=config.activation_dropout,
            output_dropout=config.moe_token_dropout,
        )

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, padding_mask: Tensor | bool | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            padding_mask: additive attention mask ``[B, 1, Q, keys]`` of a full pass, or ``[B * S]``, nonzero at
                padding; None or False where there is none.
            mask: instead of it, which tokens are not padding: bool ``[B, S]`` or what is broadcast to it.

        Returns:
            The output ``[B, S, H]``, zero for padding and for tokens that no expert had a place for, and the router's
            logits ``[B * S, E]``.
        """
        if isinstance(padding_mask, Tensor):
            mask = not_padding(padding_mask, math.prod(hidden_states.shape[:-1]))
        return super().forward(hidden_states, mask)

    def route(self, tokens: Tensor, shape: torch.Size, mask: Tensor | None) -> RouterOutput:
        output: RouterOutput = self.router(tokens, None if mask is None else ~mask, dense=False)
        if self.training:
            return output
        # Dropout of a token's expert scales what is left in training; the model wants the opposite in evaluation.
        return output._replace(routing_weights=output.routing_weights * (1 - self.output_dropout))
