"""Every sparse layer of a model against the definition of its ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekernels.nn import SparseMLP
from moekernels.ops import reference

# One rounding of the largest element, for where plain PyTorch happens to be exact.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class LayerCheck(NamedTuple):
    """What a layer got wrong, and what it may.

    Attributes:
        layer: its name in the model.
        routed: its router chose the reference's experts, with the same weights.
        error: the largest difference of its output from the reference's in float64.
        plain_error: what the reference itself is off when it computes in the layer's dtype.
        allowed: twice that, and one rounding.
    """

    layer: str
    routed: bool
    error: float
    plain_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.routed and self.error <= self.allowed


@torch.no_grad()
def check_layers(model: Any, input_ids: Tensor) -> list[LayerCheck]:
    """Runs the model on ids ``[B, S]`` and checks what each of its sparse layers made of its input."""
    seen: dict[str, tuple[SparseMLP, Tensor, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, SparseMLP):

            def keep(layer: Any, inputs: Any, outputs: Any, name: str = name) -> None:
                seen[name] = (layer, inputs[0], outputs[0])

            hooks.append(module.register_forward_hook(keep))
    try:
        model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [_check(name, *what) for name, what in seen.items()]


def _check(name: str, layer: SparseMLP, hidden: Tensor, output: Tensor) -> LayerCheck:
    hidden, output = hidden.reshape(-1, hidden.shape[-1]), output.reshape(-1, output.shape[-1])
    gate, experts = layer.gate, layer.experts
    logits, weights, expert_ids = gate(hidden)
    true_weights, true_ids = reference.route(logits, gate.top_k, scoring=gate.scoring, renormalize=gate.renormalize)
    routed = torch.equal(expert_ids, true_ids) and torch.allclose(weights, true_weights, rtol=1e-5, atol=1e-7)
    plan = reference.plan(true_ids, experts.num_experts)

    def mlp(dtype: torch.dtype) -> Tensor:
        return reference.sparse_mlp(
            hidden.to(dtype),
            true_weights.double() if dtype == torch.float64 else true_weights,
            plan,
            experts.up_weight.to(dtype),
            experts.down_proj.to(dtype),
            activation=experts.activation,
            gated=experts.gated,
        ).double()

    truth = mlp(torch.float64)
    plain_error = (mlp(output.dtype) - truth).abs().max().item()
    error = (output.double() - truth).abs().max().item()
    rounding = _ROUNDING[output.dtype] * truth.abs().max().item()
    return LayerCheck(name, routed, error, plain_error, 2 * plain_error + rounding)
