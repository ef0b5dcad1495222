"""A layer's experts, run by the kernels on weights that belong to modules of transformers.

Letters: T tokens, E experts, K choices per token, H hidden size, F expert size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops

# Modules that compute one of the kernels' activations.
_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
}
_FUNCTIONS: dict[object, str] = {F.silu: "silu", F.relu: "relu", F.gelu: "gelu"}


def activation_name(module: object) -> str | None:
    """What the kernels call this activation, a module or a function of torch; None if they do not have it."""
    if callable(module) and not isinstance(module, nn.Module):
        return _FUNCTIONS.get(module)
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name == "torch.nn.modules.activation.GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name == "transformers.activations.GELUActivation":
        return "gelu" if getattr(module, "act", None) is F.gelu else None
    return _ACTIVATIONS.get(name)


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer, as stacks or one by one.

    Attributes:
        up: ``[E, 2F, H]`` when gated, the gate's rows first, else ``[E, F, H]``; or ``[F, H]`` each, E times the gate
            and the value, or E times the one.
        down: ``[E, H, F]``; or E times ``[H, F]``.
        up_bias, down_bias: ``[E, 2F]`` or ``[E, F]``, and ``[E, H]``; or one by one; or None.
    """

    up: Tensor | Sequence[Tensor]
    down: Tensor | Sequence[Tensor]
    up_bias: Tensor | Sequence[Tensor] | None = None
    down_bias: Tensor | Sequence[Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        tensors = [t for part in self if part is not None for t in ([part] if isinstance(part, Tensor) else part)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: ExpertWeights,
    *,
    activation: str | ops.Swiglu,
    gated: bool,
    inner_dropout: float = 0.0,
    output_dropout: float = 0.0,
    zero_unvisited: bool = False,
) -> Tensor:
    """The weighted sum of every token's experts.

    Args:
        hidden: ``[T, H]``, computed in the dtype of the weights.
        expert_ids: ``[T, K]``, any integer dtype; ids outside [0, E) take no part.
        routing_weights: ``[T, K]``.
        inner_dropout, output_dropout: shares of the inner activations, and of the experts' outputs, that are zeroed.
        zero_unvisited: whether an expert without tokens gets a gradient of zeros, where its weights are no stack.

    Returns:
        ``[T, H]`` in the dtype of `hidden`.
    """
    up, down, up_bias, down_bias = experts
    plan = ops.plan(expert_ids.int(), len(down))
    tokens = hidden.to(down.dtype if isinstance(down, Tensor) else down[0].dtype)
    weights = routing_weights.float()
    if not inner_dropout and not output_dropout:
        out = ops.sparse_mlp(
            tokens,
            weights,
            plan,
            up,
            down,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=activation,
            gated=gated,
            zero_unvisited=zero_unvisited,
        )
        return out.to(hidden.dtype)
    rows = ops.permute(tokens, plan.token_of_row)
    gemm = partial(ops.grouped_gemm, zero_unvisited=zero_unvisited)
    inner = gemm(rows, up, plan.expert_offsets, bias=up_bias, activation=activation, gated=gated)
    inner = F.dropout(inner, inner_dropout)
    rows = gemm(inner, down, plan.expert_offsets, bias=down_bias)
    rows = F.dropout(rows, output_dropout)
    return ops.unpermute(rows, plan.row_of_slot, weights).to(hidden.dtype)
