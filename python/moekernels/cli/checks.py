"""The router and the experts of every sparse layer of a model against the definitions of what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moekernels import ops
from moekernels.nn import GroupedExperts
from moekernels.ops import reference

# One rounding of the largest element, for where plain PyTorch happens to be exact.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class LayerCheck(NamedTuple):
    """What a layer got wrong, and what it may.

    Attributes:
        layer: its name in the model.
        misrouted: how many tokens got other experts than the reference gives them, or other weights.
        error: the largest difference of its output from the reference's in float64.
        plain_error: what the reference itself is off when it computes in the layer's dtype.
        allowed: twice that, and one rounding.
    """

    layer: str
    misrouted: int
    error: float
    plain_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.misrouted == 0 and self.error <= self.allowed


class _Routing(NamedTuple):
    """A call of the routing op: what it was given, by name, and what it returned."""

    arguments: dict[str, Any]
    weights: Tensor
    expert_ids: Tensor


class _LastRouting(TorchDispatchMode):
    """Keeps the last call of the routing op, whoever calls it."""

    routing: _Routing | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.moekernels.route.default:
            names = (argument.name for argument in func._schema.arguments)
            # Those at the end that have their default are not passed on.
            self.routing = _Routing(dict(zip(names, args, strict=False)), *out)
        return out


class _Call(NamedTuple):
    routing: _Routing
    experts: GroupedExperts
    hidden: Tensor
    routing_weights: Tensor
    plan: ops.Plan
    out: Tensor


@torch.no_grad()
def check_layers(model: nn.Module, inputs: dict[str, Tensor]) -> list[LayerCheck]:
    """Runs the model in evaluation on these keywords, and checks what each sparse layer computed."""
    with _recorded(model) as calls:
        model.eval()(**inputs)
    return [_check(name, call) for name, call in calls.items()]


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, _Call]]:
    """The last call of router and experts of every sparse layer, by the layer's name."""
    calls: dict[str, _Call] = {}
    last = _LastRouting()

    def record(name: str, experts: Any, args: tuple[Tensor, Tensor, ops.Plan], out: Tensor) -> None:
        assert last.routing is not None  # a layer's router is called before its experts
        calls[name.rpartition(".")[0]] = _Call(last.routing, experts, *args, out)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, GroupedExperts):
                stack.enter_context(module.register_forward_hook(partial(record, name)))
        stack.enter_context(last)
        yield calls


def _check(name: str, call: _Call) -> LayerCheck:
    experts = call.experts

    def mlp(dtype: torch.dtype) -> Tensor:
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        return reference.sparse_mlp(
            call.hidden.to(dtype),
            call.routing_weights.double() if dtype == torch.float64 else call.routing_weights,
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
    return LayerCheck(name, _misrouted(call.routing), error, plain_error, 2 * plain_error + rounding)


def _misrouted(routing: _Routing) -> int:
    """How many tokens were not sent where :func:`moekernels.ops.reference.route` sends them."""
    logits: Tensor = routing.arguments["logits"]
    weights, expert_ids = reference.route(**routing.arguments)
    # The rule "sparsemixer" computes in the dtype of the logits; the others in float32, and then they round.
    in_logits_dtype = routing.arguments.get("scoring") == "sparsemixer"
    dtype = logits.dtype if in_logits_dtype else routing.arguments.get("probs_dtype") or torch.float32
    rounding = 2 * _ROUNDING[dtype]  # the reference rounds too

    def chosen(ids: Tensor) -> Tensor:
        return logits.float().gather(-1, ids.clamp(min=0).long())

    # Two probabilities that round alike may come in either order.
    is_tie = (chosen(routing.expert_ids) - chosen(expert_ids)).abs() <= rounding
    is_tie &= (routing.expert_ids >= 0) & (expert_ids >= 0)
    is_close = (routing.weights - weights).abs() <= rounding * weights.amax(dim=-1, keepdim=True)
    is_right = ((routing.expert_ids == expert_ids) | is_tie) & is_close
    return int((~is_right.all(dim=-1)).sum())
