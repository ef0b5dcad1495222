"""Swapping the MoE modules of a model of transformers, and undoing it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from types import MethodType

from torch import nn

from moekernels import ops
from moekernels.integrations.transformers.adapted import warn_of_adapted_routers
from moekernels.integrations.transformers.layers import NllbExperts, warn_of_nllb
from moekernels.integrations.transformers.plain import is_own_forward
from moekernels.integrations.transformers.swaps import Swap, swapped_class
from moekernels.integrations.transformers.table import swap_for
from moekernels.quantization import Format, QuantizedWeight, parse_format

_LOOKS_LIKE_MOE = re.compile(r"Moe(Block|MLP|Layer)?$|MoE$|SparseMLP$|Experts$", re.IGNORECASE)


@dataclass(frozen=True)
class ReplacedLayers:
    """What :func:`replace_moe_layers` did.

    Attributes:
        names: the replaced modules, by their names in the model.
        classes: how many of each class.
        expert_bytes: expert weights that the kernels read, where they are.
        by_modules: replaced modules that compute as transformers does for now, and why (`strict=False`).
        skipped: modules that look like experts but are unknown, with their classes.
    """

    names: tuple[str, ...]
    classes: dict[str, int]
    expert_bytes: int
    by_modules: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.classes.items())
        text = f"moekernels runs {counts}; {self.expert_bytes / 2**20:.1f} MiB of expert weights used in place"
        if self.by_modules:
            text += f"; as transformers does for now: {', '.join(f'{n} ({why})' for n, why in self.by_modules.items())}"
        if self.skipped:
            text += f"; left alone: {', '.join(f'{name} ({kind})' for name, kind in self.skipped.items())}"
        return text


def replace_moe_layers(model: nn.Module, *, strict: bool = True, weights: str | Format | None = None) -> ReplacedLayers:
    """Let moekernels run the MoE modules of a model of transformers, in place.

    Parameters, their names in the state dict, `save_pretrained`, router logits, auxiliary losses, training and
    `generate` stay as they were; results are those of the model's definition. Works for OLMoE, PhiMoE, Switch
    Transformers, NLLB-MoE, Mixtral, Qwen-MoE, Llama 4, DBRX, JetMoE and Granite-MoE of transformers 4.56 and 4.57, and
    from 5.0 on for these (Switch from 5.18), LongCat-Flash, Step 3.7 and every model of the experts interface.

    Nothing is copied, packed or kept: each call reads the weights where they are. Whatever others do to the model, now
    or later, thus holds: where a module of the experts has hooks, an adapter, a quantised Linear, or a weight that is
    pruned, normed, offloaded or float64, the layer computes what it did before by calling its modules, and a warning
    says once which module and why. Another warning names routers that adapters of PEFT would train.

    Args:
        model: any module; its MoE modules are found by their classes. Those replaced before are left alone.
        strict: refuse a model some of whose experts, as they are now, the kernels could not run. Hooks do not count,
            nor that weights are sharded (FSDP2 gathers them before a call). If False they are replaced as well, and
            the kernels run them as soon as they can.
        weights: a format of :mod:`moekernels.quantization`, such as "int4" or "nf4", in which the experts' weights are
            held from then on, one after the other, so that the memory of the whole ones is free. They cannot be trained
            then, and :func:`restore_moe_layers` leaves them as they are.

    Returns:
        What was replaced; `print` it.

    Raises:
        ValueError: there is nothing to replace, or a module cannot be (an activation the kernels do not have, a
            `forward` of its own; unless `strict` is False also adapters, quantised, pruned, normed, offloaded or
            float64 weights; with `weights` a shape that the format cannot have): the message says which and why, and
            the model is as it was.
    """
    format = None if weights is None else parse_format(weights, "replace_moe_layers: weights")
    found: list[tuple[str, nn.Module, type[Swap]]] = []
    by_modules: dict[str, str] = {}
    skipped: dict[str, str] = {}
    done = 0
    for name, module in model.named_modules():
        if isinstance(module, Swap):
            done += 1
        elif (swap := swap_for(module)) is not None:
            where = f"replace_moe_layers: {name} ({type(module).__name__})"
            if reason := _why_not_called(module) or swap.refuses(module):
                raise ValueError(f"{where} cannot be replaced: {reason}")
            if reason := swap.hinders(module):
                if strict:
                    raise ValueError(f"{where} cannot be run by the kernels as it is: {reason}; see strict=False")
                by_modules[name] = reason
            found.append((name, module, swap))
        elif _LOOKS_LIKE_MOE.search(type(module).__name__):
            skipped[name] = type(module).__name__
    # Neither a block whose parts are replaced, nor a part of a replaced block, is left alone.
    skipped = {
        name: kind
        for name, kind in skipped.items()
        if not any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other, _, _ in found)
    }
    if not found and not done:
        hint = f"; unknown: {', '.join(f'{name} ({kind})' for name, kind in skipped.items())}" if skipped else ""
        raise ValueError(f"replace_moe_layers: {type(model).__name__} has no MoE module that moekernels knows{hint}")

    to_quantize = [] if format is None else _weights_for(found, format)

    made = [swapped_class(type(module), swap) for _, module, swap in found]
    for (_, module, _), cls in zip(found, made, strict=True):
        _change_class(module, cls)
    for module, name in to_quantize:
        assert format is not None
        quantized = ops.quantize(getattr(module, name).detach(), format)
        setattr(module, name, nn.Parameter(quantized, requires_grad=False))
    if any(swap is NllbExperts for _, _, swap in found):
        warn_of_nllb()
    warn_of_adapted_routers(model)
    return ReplacedLayers(
        tuple(name for name, _, _ in found),
        dict(Counter(type(module).__name__ for _, module, _ in found)),
        sum(swap.num_bytes(module) for _, module, swap in found),
        by_modules,
        skipped,
    )


def _weights_for(found: list[tuple[str, nn.Module, type[Swap]]], format: Format) -> list[tuple[nn.Module, str]]:
    """The experts' weights that are to be quantised; those that are stay as they are."""
    weights = []
    for name, module, swap in found:
        where = f"replace_moe_layers: {name} ({type(module).__name__})"
        try:
            owned = swap.expert_weights(module)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for owner, parameter in owned:
            weight = getattr(owner, parameter)
            if not isinstance(weight, QuantizedWeight):
                format.check_shape(weight.shape, f"{where}: {parameter}")
                weights.append((owner, parameter))
    return weights


def restore_moe_layers(model: nn.Module) -> int:
    """Undo :func:`replace_moe_layers`: modules compute as before.

    Returns:
        The number of modules that were restored; 0 if none had been replaced.

    Raises:
        ValueError: something has derived a class of its own from a replaced module's since (FSDP2, a parametrization):
            undo that first. Nothing is changed.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Swap)]
    for name, module in found:
        if type(module) is not swapped_class(module.original, module.swap):
            raise ValueError(
                f"restore_moe_layers: {name} became a {type(module).__name__} since it was replaced (by fully_shard or "
                "a parametrization); undo that first"
            )
    for _, module in found:
        _change_class(module, module.original)
    return len(found)


# Where an instance holds its class's own forward: transformers 4 leaves it there when it has recorded router logits,
# and accelerate's hooks call it there.
_BOUND = ("forward", "_old_forward")


def _why_not_called(module: nn.Module) -> str | None:
    """Why a `forward` of the class would not be called; None if it would."""
    hooked = hasattr(module, "_hf_hook") and is_own_forward(module, module.__dict__.get("_old_forward"))
    if hooked or "forward" not in module.__dict__ or is_own_forward(module, module.__dict__["forward"]):
        return None
    if getattr(module, "_is_hooked", False):
        return (
            "transformers has divided it among processes, and calls the forward that it had then; call register() and "
            'load with from_pretrained(..., experts_implementation="moekernels"), which runs the kernels there'
        )
    return "its forward was replaced on the instance (by kernelize, for example)"


def _change_class(module: nn.Module, to: type[nn.Module]) -> None:
    own = [name for name in _BOUND if is_own_forward(module, module.__dict__.get(name))]
    module.__class__ = to
    for name in own:
        module.__dict__[name] = MethodType(to.forward, module)
