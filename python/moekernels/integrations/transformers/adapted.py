"""PEFT's wrappers of stacks of experts, which add to products instead of building weights.

Letters: T tokens, K choices per token, H hidden size.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn

from moekernels.integrations.transformers.experts import ExpertWeights
from moekernels.integrations.transformers.fused import Structure, plain_stacks, run_planned, run_stacks, structure_of
from moekernels.integrations.transformers.layers import FusedExperts
from moekernels.integrations.transformers.lora import adapters_of, is_adapter, is_wrapper
from moekernels.integrations.transformers.plain import say_why, why_not_plain
from moekernels.integrations.transformers.swaps import Swap
from moekernels.nn import GroupedExperts
from moekernels.ops._low_rank import LowRank


class Adapted(NamedTuple):
    """What the experts in wrappers are computed with."""

    experts: nn.Module
    structure: Structure
    stacks: ExpertWeights
    adapters: dict[str, LowRank]


class LoraWrapper(Swap):
    """PEFT's wrapper of a stack of :class:`FusedExperts`, perhaps around another one of theirs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = self._found(len(args), kwargs)
        if isinstance(found, str):
            say_why(self.stock, found)
            return self.original.forward(self, x, *args, **kwargs)
        return self._run(found, x, *args)

    def _run(self, found: Adapted, hidden: Tensor, *routing: Any) -> Tensor:
        expert_ids, weights = routing
        return run_stacks(found.experts, found.structure, hidden, expert_ids, weights, found.stacks, found.adapters)

    def _structure(self, experts: nn.Module) -> Structure | str:
        if not isinstance(experts, FusedExperts):
            return f"the experts in it, a {type(experts).__name__}, are not replaced"
        return structure_of(experts)

    def _found(self, num_args: int, kwargs: dict[str, Any]) -> Adapted | str:
        """What is computed with, or why PEFT's own way is taken."""
        experts = in_wrappers(self)
        structure = self._structure(experts)
        if isinstance(structure, str):
            return structure
        if reason := why_not_plain(experts, type(experts)):
            return f"the module of the experts {reason}"
        if num_args != 2 or kwargs:
            return "it is called with other arguments than hidden states and their routing"
        found = adapters_of(self, structure.transposed)
        if isinstance(found, str):
            return found
        stacks = plain_stacks(experts, structure)
        return stacks if isinstance(stacks, str) else Adapted(experts, structure, stacks, found[1])


class OwnLoraWrapper(LoraWrapper):
    """The same of :class:`moekernels.nn.GroupedExperts`: ``forward(hidden [T, H], routing weights [T, K], plan)``."""

    def _structure(self, experts: nn.Module) -> Structure | str:
        if type(experts) is not GroupedExperts:
            return f"the experts in it are a {type(experts).__name__}"
        return Structure(
            up="gate_up_proj" if experts.gated else "up_proj",
            gated=experts.gated,
            biased=experts.down_proj_bias is not None,
            transposed=False,
            activation=experts.activation,
            normed=False,
        )

    def _run(self, found: Adapted, hidden: Tensor, *routing: Any) -> Tensor:
        weights, plan = routing
        experts, structure, stacks, adapters = found
        return run_planned(experts, structure, hidden, plan, weights, stacks, adapters)


def in_wrappers(module: Any) -> nn.Module:
    """The module that wrappers are around; a module without wrappers is itself."""
    while is_wrapper(module):
        module = module.base_layer
    return module


_ROUTERS = ("gate", "router")  # what models call them, beside their experts


def warn_of_adapted_routers(model: nn.Module) -> None:
    """Say which routers of replaced layers carry adapters: training these changes which experts a token chooses."""
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for name, module in modules.items():
        if not is_adapter(module):
            continue
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part in _ROUTERS and _has_replaced(modules[".".join(parts[:i])]):
                found[".".join(parts[: i + 1])] = None
    if not found:
        return
    first, *others = found
    more = f" and {len(others)} more" if others else ""
    warnings.warn(
        f"{first}{more} of this model's routers carry adapters of PEFT, as target_modules='all-linear' has it: "
        "training them changes which experts tokens choose. To leave routers out, name the modules in target_modules "
        "and the stacks of experts in target_parameters; exclude_modules leaves out modules, but no router that is "
        "adapted as a parameter",
        stacklevel=3,
    )


def _has_replaced(module: nn.Module) -> bool:
    return isinstance(module, Swap) or any(
        isinstance(child, Swap) or isinstance(in_wrappers(child), Swap) for child in module.children()
    )


def wrapper_swap(module: nn.Module, experts_swap: type[Swap] | None) -> type[Swap] | None:
    """What replaces a wrapper around experts that `experts_swap` replaces."""
    if experts_swap is FusedExperts:
        return LoraWrapper
    return OwnLoraWrapper if type(in_wrappers(module)) is GroupedExperts else None
