"""Swapping the MoE modules of a model of transformers, and undoing it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from moekernels.integrations.transformers.swaps import Swap, swap_for, swapped_class

_LOOKS_LIKE_MOE = re.compile(r"Moe(Block|MLP|Layer)?$|MoE$|SparseMLP$|Experts$", re.IGNORECASE)


@dataclass(frozen=True)
class ReplacedLayers:
    """What :func:`replace_moe_layers` did.

    Attributes:
        names: the replaced modules, by their names in the model.
        classes: how many of each class.
        packed_bytes: weights that had to be packed, because each expert had a Linear of its own. They are not held
            twice: the old ones are views of the packed ones.
        shared_bytes: expert weights that were used where they are.
        skipped: modules that look like experts but are unknown, with their classes.
    """

    names: tuple[str, ...]
    classes: dict[str, int]
    packed_bytes: int
    shared_bytes: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.classes.items())
        text = (
            f"moekernels runs {counts}; {self.packed_bytes / 2**20:.1f} MiB of expert weights packed, "
            f"{self.shared_bytes / 2**20:.1f} MiB used in place"
        )
        if self.skipped:
            text += f"; left alone: {', '.join(f'{name} ({kind})' for name, kind in self.skipped.items())}"
        return text


def replace_moe_layers(model: nn.Module) -> ReplacedLayers:
    """Let moekernels run the MoE modules of a model of transformers, in place.

    Parameters, their names in the state dict, `save_pretrained`, router logits, auxiliary losses, training and
    `generate` stay as they were; results are those of the model's definition. Works for OLMoE, PhiMoE, Switch
    Transformers, NLLB-MoE, Mixtral and Qwen-MoE of transformers 4.56 and 4.57, and from 5.0 on for these (Switch from
    5.18) and every model whose experts follow the experts interface without departing from its defaults.

    Fused expert weights (transformers 5) are used where they are. Experts with a Linear each are packed once, layer by
    layer; the Linears' weights become views of the pack.

    Args:
        model: any module; its MoE modules are found by their classes. Those replaced before are left alone.

    Returns:
        What was replaced; `print` it to see how much was packed.

    Raises:
        ValueError: there is nothing to replace, or a module cannot be (quantised, sharded, offloaded, an activation the
            kernels do not have): the message says which and why, and the model is as it was.
    """
    found: list[tuple[str, nn.Module, type[Swap]]] = []
    skipped: dict[str, str] = {}
    done = 0
    for name, module in model.named_modules():
        if isinstance(module, Swap):
            done += 1
        elif (swap := swap_for(module)) is not None:
            if reason := _why_not_called(module) or swap.refuses(module):
                raise ValueError(f"replace_moe_layers: {name} ({type(module).__name__}) cannot be replaced: {reason}")
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

    packed = shared = 0
    for _, module, swap in found:
        _change_class(module, swapped_class(type(module), swap))
        assert isinstance(module, Swap)
        packed += module.install()
        if hasattr(module, "down_proj"):
            shared += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return ReplacedLayers(
        tuple(name for name, _, _ in found),
        dict(Counter(type(module).__name__ for _, module, _ in found)),
        packed,
        shared,
        skipped,
    )


def restore_moe_layers(model: nn.Module) -> int:
    """Undo :func:`replace_moe_layers`: modules compute as before, and packed weights have memory of their own again.

    Returns:
        The number of modules that were restored; 0 if none had been replaced.
    """
    restored = 0
    for module in model.modules():
        if isinstance(module, Swap):
            module.uninstall()
            _change_class(module, module.original)
            restored += 1
    return restored


def _why_not_called(module: nn.Module) -> str | None:
    """Why a `forward` of the class would not be called; None if it would."""
    forward = module.__dict__.get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    return "its forward was replaced on the instance (by hooks that offload weights, or by kernelize)"


def _change_class(module: nn.Module, to: type[nn.Module]) -> None:
    # transformers 4 leaves the class's own forward on an instance whose router logits it recorded.
    module.__dict__.pop("forward", None)
    module.__class__ = to
