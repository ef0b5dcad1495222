"""The experts of every sparse layer of a model against the definition of what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.nn import GroupedExperts
from moekernels.ops import reference

# One rounding of the largest element, for where plain PyTorch happens to be exact.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class LayerCheck(NamedTuple):
    """What a layer got wrong, and what it may.

    Attributes:
        layer: its name in the model.
        error: the largest difference of its output from the reference's in float64.
        plain_error: what the reference itself is off when it computes in the layer's dtype.
        allowed: twice that, and one rounding.
    """

    layer: str
    error: float
    plain_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


class _Call(NamedTuple):
    experts: GroupedExperts
    hidden: Tensor
    expert_weights: Tensor
    plan: ops.Plan
    out: Tensor


@torch.no_grad()
def check_layers(model: nn.Module, inputs: dict[str, Tensor]) -> list[LayerCheck]:
    """Runs the model in evaluation on these keywords, and checks what the experts of each sparse layer computed."""
    with _recorded(model) as calls:
        model.eval()(**inputs)
    return [_check(name, call) for name, call in calls.items()]


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, _Call]]:
    """The last call of the experts of every sparse layer, by the layer's name."""
    calls: dict[str, _Call] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GroupedExperts)}
    for name, experts in layers.items():

        def recording(hidden: Tensor, weights: Tensor, plan: ops.Plan, name: str = name, own: Any = experts) -> Tensor:
            out = GroupedExperts.forward_fused(own, hidden, weights, plan)
            calls[name.rpartition(".")[0]] = _Call(own, hidden, weights, plan, out)
            return out

        experts.__dict__["forward_fused"] = recording
    try:
        yield calls
    finally:
        for experts in layers.values():
            del experts.__dict__["forward_fused"]


def _check(name: str, call: _Call) -> LayerCheck:
    experts = call.experts

    def mlp(dtype: torch.dtype) -> Tensor:
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        return reference.sparse_mlp(
            call.hidden.to(dtype),
            call.expert_weights.double() if dtype == torch.float64 else call.expert_weights,
            call.plan,
            experts.up_weight.to(dtype),
            experts.down_proj.to(dtype),
            up_bias=cast(experts.up_bias),
            down_bias=cast(experts.down_proj_bias),
            activation=experts.activation,
            gated=experts.gated,
        ).double()

    truth = mlp(torch.float64)
    plain_error = (mlp(call.out.dtype) - truth).abs().max().item()
    error = (call.out.double() - truth).abs().max().item()
    rounding = _ROUNDING[call.out.dtype] * truth.abs().max().item()
    return LayerCheck(name, error, plain_error, 2 * plain_error + rounding)
