"""A sparse MLP for any Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekernels._settings import autocast_dtype
from moekernels.nn.dispatcher import Dispatcher, LocalDispatcher
from moekernels.nn.experts import GroupedExperts
from moekernels.nn.router import TopKRouter
from moekernels.nn.sparsemixer import SparsemixerRouter


class SparseMLP(nn.Module):
    """Router and experts in place of a dense MLP: each token visits `top_k` of `num_experts` experts.

    Under `torch.autocast` router and experts compute in its dtype, as linear layers do; choosing and weighting stay in
    float32.

    Args:
        hidden_size: width of a token.
        ffn_size: inner width of one expert.
        num_experts: number of experts.
        top_k: experts per token.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "none".
        gated: experts with a gate projection (SwiGLU with "silu").
        bias: experts with biases.
        scoring: the scoring rule of :func:`moekernels.ops.route`; with "sparsemixer" experts are drawn in training.
        renormalize: divide a token's expert weights by their sum.
        epsilon: half the width of a near-tie in the "sparsemixer" rule.
        dispatcher: how rows reach the experts; None keeps all experts here and runs them as one fused op.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        scoring: str = "softmax",
        renormalize: bool = False,
        epsilon: float = 0.01,
        dispatcher: Dispatcher | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        router = SparsemixerRouter if scoring == "sparsemixer" else TopKRouter
        self.gate = router(
            hidden_size,
            num_experts,
            top_k,
            scoring=scoring,
            renormalize=renormalize,
            epsilon=epsilon,
            device=device,
            dtype=dtype,
        )
        self.experts = GroupedExperts(
            hidden_size,
            ffn_size,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts) if dispatcher is None else dispatcher

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden: ``[..., H]``; computed in the dtype of the weights, or in that of autocast.
            mask: optional, one entry per token; tokens with 0 visit no expert and yield zero.

        Returns:
            The output ``[..., H]``, and the router's logits ``[T, E]`` for an auxiliary loss.
        """
        shape = hidden.shape
        hidden = hidden.reshape(-1, shape[-1])
        if autocast_dtype(hidden.device) is None:
            hidden = hidden.to(self.experts.down_proj.dtype)
        mask = None if mask is None else mask.reshape(-1) != 0
        logits, expert_weights, expert_ids = self.gate(hidden, mask)
        if isinstance(self.dispatcher, LocalDispatcher):
            out = self.experts.forward_fused(hidden, expert_weights, self.dispatcher.plan(expert_ids))
        else:
            rows, expert_offsets, context = self.dispatcher.dispatch(hidden, expert_ids, expert_weights)
            out = self.dispatcher.combine(self.experts(rows, expert_offsets), context)
        return out.view(shape), logits
