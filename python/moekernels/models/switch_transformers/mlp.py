"""The MLP of a layer: dense, or a router and experts.

Letters: B batch, S tokens of a sequence, E experts, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.switch_transformers.config import SwitchTransformersConfig, activation_and_gate
from moekernels.models.switch_transformers.router import SwitchTransformersTop1Router
from moekernels.nn import GroupedExperts, RouterOutput, SparseMLP
from moekernels.nn.activations import op_activation
from moekernels.nn.linear import project


class SwitchTransformersDenseActDense(nn.Module):
    """The MLP of a dense layer: ``wo(act(wi(x)))``, or ``wo(act(wi_0(x)) * wi_1(x))`` with a gate."""

    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        activation, self.gated = activation_and_gate(config.dense_act_fn)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.activation = op_activation(activation)
        self.dropout = config.dropout_rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        if self.gated:
            inner = project(self.wi_0, hidden_states, self.activation) * project(self.wi_1, hidden_states)
        else:
            inner = project(self.wi, hidden_states, self.activation)
        return project(self.wo, F.dropout(inner, self.dropout, self.training))


class SwitchTransformersSparseMLP(SparseMLP):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        expert_class: what an expert is; only :class:`SwitchTransformersDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: SwitchTransformersConfig, expert_class: type[nn.Module] = SwitchTransformersDenseActDense
    ) -> None:
        if expert_class is not SwitchTransformersDenseActDense:
            raise ValueError(
                "SwitchTransformersSparseMLP: experts are fused, so expert_class must be "
                f"SwitchTransformersDenseActDense, got {expert_class.__name__}"
            )
        activation, gated = activation_and_gate(config.dense_act_fn)
        experts = GroupedExperts(
            config.d_model, config.d_ff, config.num_experts, activation=op_activation(activation), gated=gated
        )
        super().__init__(SwitchTransformersTop1Router(config), experts, dropout=config.dropout_rate)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            mask: bool ``[B, S]`` or what is broadcast to it, False at padding; only looked at if the router ignores
                padding.

        Returns:
            The output ``[B, S, H]``, zero for tokens whose expert had no place for them, and the router's logits
            ``[B, S, E]``.
        """
        return super().forward(hidden_states, mask)

    def route(self, tokens: Tensor, shape: torch.Size, mask: Tensor | None) -> RouterOutput:
        # An expert's places are counted within a sequence.
        output: RouterOutput = self.router(tokens.view(shape), mask, dense=False)
        return output
