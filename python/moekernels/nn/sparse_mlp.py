"""A sparse MLP for any Transformer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from moekernels.nn._checks import check, check_share
from moekernels.nn.dispatcher import Dispatcher, Experts, LocalDispatcher
from moekernels.nn.experts import GroupedExperts
from moekernels.nn.router import RouterOutput, TopKRouter
from moekernels.nn.sparsemixer import SparsemixerRouter


class SparseMLP(nn.Module):
    """Router and experts in place of a dense MLP: each token visits `top_k` of `num_experts` experts.

    Made from sizes, or from its parts. Under `torch.autocast` router and experts compute in its dtype, as linear layers
    do; choosing and weighting stay in float32.

    Args:
        hidden_size: width of a token.
        ffn_size: inner width of one expert.
        num_experts: number of experts.
        top_k: experts per token.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "none".
        gated: experts with a gate projection (SwiGLU with "silu").
        bias: experts with biases.
        scoring: the scoring rule of :func:`moekernels.ops.route`; with "sparsemixer" experts are drawn in training.
        renormalize: divide a token's routing weights by their sum.
        eps: half the width of a near-tie in the "sparsemixer" rule.
        router: a module that maps ``[..., H]`` and an optional mask ``[T]`` to a :class:`RouterOutput`.
        experts: a module that is called as :class:`GroupedExperts`.
        dispatcher: how tokens reach the experts; None keeps all experts here.
        dropout: share of the experts' inner activations that is set to zero in training.
        output_dropout: the same of the experts' outputs.
        shared_experts: a module that maps ``[T, H]`` to what every token gets besides, a dense MLP.

    Raises:
        ValueError: a size or a name is none that the layer can have, or the parts do not fit together.
    """

    @overload
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
        eps: float = 0.01,
        dispatcher: Dispatcher | None = None,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        shared_experts: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        dispatcher: Dispatcher | None = None,
        *,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        shared_experts: nn.Module | None = None,
    ) -> None: ...

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        if "router" in options or isinstance(next(iter(args), None), nn.Module):
            self._compose(*args, **options)
        else:
            self._build(*args, **options)

    def _build(
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
        eps: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        kind = SparsemixerRouter if scoring == "sparsemixer" else TopKRouter
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        router = kind(hidden_size, num_experts, top_k, scoring=scoring, renormalize=renormalize, eps=eps, **where)
        experts = GroupedExperts(
            hidden_size, ffn_size, num_experts, activation=activation, gated=gated, bias=bias, **where
        )
        self._compose(router, experts, **options)

    def _compose(
        self,
        router: nn.Module,
        experts: nn.Module,
        dispatcher: Dispatcher | None = None,
        *,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        shared_experts: nn.Module | None = None,
    ) -> None:
        check_share(self, "dropout", dropout)
        check_share(self, "output_dropout", output_dropout)
        if dispatcher is None:
            # With another one, some of the experts may be elsewhere.
            num_experts: Any = experts.num_experts
            routed = getattr(router, "num_experts", num_experts)
            check(self, "the router's num_experts", routed, routed == num_experts, f"the experts' ({num_experts})")
            dispatcher = LocalDispatcher(num_experts)
        width: Any = getattr(experts, "hidden_size", None)
        routed_width = getattr(router, "hidden_size", width)
        fits = width is None or routed_width == width
        check(self, "the router's hidden_size", routed_width, fits, f"the experts' ({width})")
        self.router = router
        self.register_load_state_dict_pre_hook(_rename_gate)
        self.experts = experts
        self.shared_experts = shared_experts
        self.dispatcher = dispatcher
        self.dropout = dropout
        self.output_dropout = output_dropout

    def route(self, tokens: Tensor, shape: torch.Size, mask: Tensor | None) -> RouterOutput:
        """Ask the router about ``tokens [T, H]``, which came in `shape`; `mask` is bool ``[T]``."""
        output: RouterOutput = self.router(tokens, mask)
        return output

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden: ``[..., H]``; computed in the dtype of the weights, or in that of autocast.
            mask: optional, one entry per token, or what is broadcast to that; tokens with 0 visit no expert, shared
                ones aside, and yield zero.

        Returns:
            The output ``[..., H]``, and the router's logits ``[T, E]`` for an auxiliary loss.

        Raises:
            ValueError: `hidden` has another width, or `mask` other tokens.
        """
        shape = hidden.shape
        tokens = hidden if hidden.dim() == 2 else hidden.reshape(-1, shape[-1])
        mask = None if mask is None else _per_token(mask, shape[:-1])
        routing = self.route(tokens, shape, mask)
        experts: Experts = self.experts
        if self.training and (self.dropout or self.output_dropout):
            experts = partial(self.experts, dropout=self.dropout, output_dropout=self.output_dropout)
        out = self.dispatcher.run(tokens, routing, experts)
        if self.shared_experts is not None:
            shared: Tensor = self.shared_experts(tokens)
            out = out + (shared if mask is None else shared.masked_fill(~mask.unsqueeze(-1), 0.0))
        return out.view(shape), routing.logits


def _rename_gate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of decoders, and transformers, call the router "gate"."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}gate.")]:
        state_dict[f"{prefix}router.{name.removeprefix(f'{prefix}gate.')}"] = state_dict.pop(name)


def _per_token(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of tokens ``[...]`` as bool ``[T]``."""
    if mask.numel() != math.prod(shape):
        try:
            mask = mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"SparseMLP: mask must have one entry per token {list(shape)}, got {list(mask.shape)}"
            ) from None
    mask = mask.reshape(-1)
    return mask if mask.dtype == torch.bool else mask != 0
