"""A layer's experts, run by the kernels on weights that belong to a module of transformers.

Letters: T tokens, E experts, K choices per token, H hidden size, F expert size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from moekernels import ops

# Modules that compute one of the kernels' activations, by the name of their class: torch's, and those of
# transformers.activations.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def activation_name(module: object) -> str | None:
    """What the kernels call this activation module; None if they do not have it."""
    name = type(module).__name__
    if name == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    if name == "GELUActivation":
        return "gelu" if getattr(module, "act", None) is F.gelu else None
    return _ACTIVATIONS.get(name)


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer.

    Attributes:
        up: ``[E, 2F, H]`` when gated, the gate's rows first; else ``[E, F, H]``.
        down: ``[E, H, F]``.
        up_bias, down_bias: ``[E, 2F]`` or ``[E, F]``, and ``[E, H]``; or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def run_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: ExpertWeights,
    *,
    activation: str,
    gated: bool,
    inner_dropout: float = 0.0,
    output_dropout: float = 0.0,
) -> Tensor:
    """The weighted sum of every token's experts.

    Args:
        hidden: ``[T, H]``, computed in the dtype of the weights.
        expert_ids: ``[T, K]``, any integer dtype; ids outside [0, E) take no part.
        expert_weights: ``[T, K]``.
        inner_dropout, output_dropout: shares of the inner activations, and of the experts' outputs, that are zeroed.

    Returns:
        ``[T, H]`` in the dtype of `hidden`.
    """
    plan = ops.plan(expert_ids.int(), experts.up.shape[0])
    tokens = hidden.to(experts.up.dtype)
    weights = expert_weights.float()
    if not inner_dropout and not output_dropout:
        out = ops.sparse_mlp(
            tokens,
            weights,
            plan,
            experts.up,
            experts.down,
            up_bias=experts.up_bias,
            down_bias=experts.down_bias,
            activation=activation,
            gated=gated,
        )
        return out.to(hidden.dtype)
    rows = ops.permute(tokens, plan.token_of_row)
    inner = ops.grouped_gemm(
        rows, experts.up, plan.expert_offsets, bias=experts.up_bias, activation=activation, gated=gated
    )
    inner = F.dropout(inner, inner_dropout)
    rows = ops.grouped_gemm(inner, experts.down, plan.expert_offsets, bias=experts.down_bias)
    rows = F.dropout(rows, output_dropout)
    return ops.unpermute(rows, plan.row_of_slot, weights).to(hidden.dtype)


def why_not_fused(module: Any) -> str | None:
    """Why :func:`fused_experts` cannot serve this module of transformers 5; None if it can."""
    flags = {"is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
    for flag, wanted in flags.items():
        if getattr(module, flag, wanted) is not wanted:
            return f"its experts have {flag}={not wanted}"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != "_default_apply_gate":
        return "its experts have a gate of their own (_apply_gate)"
    if activation_name(module.act_fn) is None:
        return f"its activation {type(module.act_fn).__name__} is none of {', '.join(ops.ACTIVATIONS)}"
    return None


def fused_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind ``experts_implementation="moekernels"`` in transformers 5.

    Args:
        module: holds ``gate_up_proj`` or ``up_proj``, ``down_proj``, perhaps their biases, and ``act_fn``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; the number of experts marks a choice that another rank serves.
        top_k_weights: ``[T, K]``.

    Raises:
        ValueError: the module stores its experts in a way that the kernels do not know.
    """
    if reason := why_not_fused(module):
        raise ValueError(f"moekernels cannot run the experts of {type(module).__name__}: {reason}")
    gated = bool(getattr(module, "has_gate", True))
    name = "gate_up_proj" if gated else "up_proj"
    biased = bool(getattr(module, "has_bias", False))
    weights = ExpertWeights(
        getattr(module, name),
        module.down_proj,
        getattr(module, f"{name}_bias") if biased else None,
        module.down_proj_bias if biased else None,
    )
    activation = activation_name(module.act_fn)
    assert activation is not None
    return run_experts(hidden_states, top_k_index, top_k_weights, weights, activation=activation, gated=gated)
