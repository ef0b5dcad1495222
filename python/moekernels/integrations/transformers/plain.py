"""Whether modules may be passed by: a module that is plain does what its class says, and nothing else.

Hooks, adapters, quantised Linears, pruned, normed, sharded and offloaded weights are things that others put into a
model, before or after its layers were replaced. So the question is asked anew in every forward pass, of the modules as
they are at that moment; nothing of the answer is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from moekernels import _C
from moekernels.integrations.transformers.experts import ExpertWeights
from moekernels.quantization import QuantizedWeight

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a plain weight may be: a registered one, one that is quantised for the kernels, or what torch.func puts in its
# place. A tracer has its own.
_TENSORS = (nn.Parameter, Tensor, QuantizedWeight)
_TRACED = (*_TENSORS, FakeTensor, FunctionalTensor)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Private to torch: where it is missing, there may always be one.
_has_any_global_hook: Callable[[], bool] = getattr(torch_module, "_has_any_global_hook", lambda: True)


class Layout(NamedTuple):
    """How the experts of a layer hold their parts, and what these must be.

    Attributes:
        expert_class: the class of every expert.
        linear_class: of its projections.
        tensor_classes: what a weight or bias may be.
        dtypes: of the weights.
        up: the names of the Linears whose outputs, one after the other, are the up-projection: gate, then value.
        down: the name of the other one.
        others: the names of the further modules that an expert calls.
        settings: attributes of these that must be the same in all experts.
    """

    expert_class: type[nn.Module]
    linear_class: type[nn.Module]
    tensor_classes: tuple[type, ...]
    dtypes: tuple[torch.dtype, ...]
    up: tuple[str, ...]
    down: str
    others: tuple[str, ...]
    settings: tuple[str, ...]


def layout_of(expert_class: type[nn.Module], up: tuple[str, ...], down: str, others: tuple[str, ...]) -> Layout:
    """That of experts made of `nn.Linear`, an activation and perhaps a dropout."""
    settings = ("training", "p", "approximate", "act")
    return Layout(expert_class, nn.Linear, _TENSORS, KERNEL_DTYPES, up, down, others, settings)


def plain_experts(experts: Mapping[str, nn.Module], layout: Layout, where: str = "") -> ExpertWeights | str:
    """The weights of a layer's experts, or why calling the experts may be more than computing with these weights.

    Args:
        experts: by their names in `where`.
        where: the name, in the layer, of what holds them, with a dot.
    """
    if reason := why_all_hooked():
        return reason
    if not torch.compiler.is_compiling():
        found = _C.plain_experts(list(experts.values()), *layout)
        if found is not None:
            return ExpertWeights(*found)
    return examine(experts, layout, where)


def examine(
    experts: Mapping[str, nn.Module], layout: Layout, where: str = "", *, lasting: bool = False
) -> ExpertWeights | str:
    """What :func:`plain_experts` says, slowly: with a reason, and in Python, which torch.compile traces and guards.

    Args:
        lasting: leave out what may be otherwise in the next call: hooks, and that weights are sharded.
    """
    if not experts:
        return "it has no experts"
    found: dict[str, list[Any]] = {key: [] for key in ("up", "down", "up_bias", "down_bias")}
    first: dict[str, Any] = {}
    for number, expert in experts.items():
        key = where + number
        if reason := why_not_plain(expert, layout.expert_class, lasting=lasting):
            return f"{key} {reason}"
        for name in (*layout.up, layout.down):
            role = "down" if name == layout.down else "up"
            linear = expert._modules.get(name)
            if linear is None:
                return f"{key} has no module {name}"
            if reason := why_not_plain(linear, nn.Linear, lasting=lasting):
                return f"{key}.{name} {reason}"
            weight, bias = (_tensor_of(linear, tensor, lasting) for tensor in ("weight", "bias"))
            if reason := why_no_kernel(weight, lasting=lasting):
                return f"{key}.{name}.weight {reason}"
            if bias is not None and type(bias) not in _TRACED and not (lasting and _is_sharded(bias)):
                return f"{key}.{name}.bias is a {type(bias).__name__}"
            alike = (weight.dtype, weight.device, bias is None)
            if (
                first.setdefault(role, (weight.shape, *alike)) != (weight.shape, *alike)
                or first["up"][1:3] != alike[:2]
            ):
                return f"{key}.{name} differs from that of the first expert in shape, dtype, device or bias"
            found[role].append(weight)
            if bias is not None:
                found[f"{role}_bias"].append(bias)
        for name in layout.others:
            other = expert._modules.get(name)
            if other is None:
                return f"{key} has no module {name}"
            model = first.setdefault(name, other)
            if reason := why_not_plain(other, type(model), lasting=lasting):
                return f"{key}.{name} {reason}"
            if any(getattr(other, setting, None) != getattr(model, setting, None) for setting in layout.settings):
                return f"{key}.{name} differs from that of the first expert"
    return ExpertWeights(found["up"], found["down"], found["up_bias"] or None, found["down_bias"] or None)


def why_all_hooked() -> str | None:
    """Why no module at all is plain; None if some may be."""
    if _has_any_global_hook():
        return "there are hooks on all modules (register_module_forward_hook and the like)"
    return None


def why_not_plain(module: nn.Module, cls: type[nn.Module], *, lasting: bool = False) -> str | None:
    """Why a call of this module may do more, or other things, than its class says; None if it does not."""
    if type(module) is not cls:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__ and not is_own_forward(module, module.__dict__["forward"]):
        return "has a forward of its own"
    # Looked up as items: torch.compile leaves the attributes of these names out of its guards.
    if not lasting and any(len(module.__dict__[kind]) > 0 for kind in _HOOKS):
        return "has hooks"
    return None


def is_own_forward(module: nn.Module, bound: object) -> bool:
    """Whether this is the forward of the module's class, which hooks that were removed leave on the instance."""
    return getattr(bound, "__self__", None) is module and getattr(bound, "__func__", None) is type(module).forward


def why_no_kernel(weight: Any, *, lasting: bool = False) -> str | None:
    """Why the kernels cannot run on this weight; None if they can, or, where only what lasts is asked for, may soon."""
    if weight is None:
        return "is no parameter of its module: it is pruned, normed or computed otherwise"
    if type(weight) not in _TRACED and not (lasting and _is_sharded(weight)):
        return f"is a {type(weight).__name__}"
    if weight.is_meta:
        return "has no data (meta device): it is offloaded, or not loaded"
    if weight.dtype not in KERNEL_DTYPES:
        return f"is {weight.dtype}; the kernels take float32, bfloat16 and float16"
    return None


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, which FSDP2 gathers before a call."""
    return type(tensor).__module__.startswith("torch.distributed.tensor")


def _tensor_of(module: nn.Module, name: str, lasting: bool) -> Any:
    """A registered parameter, or what FSDP1 puts in its place; a hook that is not looked at may have put it there."""
    if name in module._parameters:
        return module._parameters[name]
    return None if lasting else module.__dict__.get(name)


_said: set[tuple[str, str]] = set()


def say_why(layer: type[nn.Module], reason: str) -> None:
    """Warn that layers of this class compute as transformers does; once for each reason."""
    if torch.compiler.is_compiling() or (layer.__name__, reason) in _said:
        return
    _said.add((layer.__name__, reason))
    warnings.warn(
        f"{layer.__name__} is computed by transformers' own modules, not by moekernels, as long as {reason}",
        stacklevel=4,
    )
