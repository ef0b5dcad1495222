"""Every experts class of the installed transformers, small, whatever its configuration calls things.

    python tests/integrations/every_experts.py

prints the table of docs/transformers.md.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers.models
from torch import Tensor, nn

from moekernels.integrations.transformers.fused import Structure, structure_of

NUM_EXPERTS, HIDDEN_SIZE, FFN_SIZE = 4, 16, 12
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = {
    **dict.fromkeys(_COUNTS, NUM_EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "latent_size"), HIDDEN_SIZE),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), FFN_SIZE),
    **dict.fromkeys(("moe_latent_size", "moe_latent_dim"), None),
}
_DECORATOR = "@use_experts_implementation"


class SmallConfig:
    """The sizes of a small layer; everything else as the configurations of the module's package have it."""

    def __init__(self, experts_class: type[nn.Module]) -> None:
        self._experts_implementation = "eager"
        self._module = experts_class.__module__.replace(".modeling_", ".configuration_")

    def __getattr__(self, name: str) -> Any:
        if name in _SIZES:
            return _SIZES[name]
        for config in _configurations(self._module):
            if (found := _value(config, name)) is not None:
                return found
        raise AttributeError(f"no configuration of {self._module} has {name}")


@cache
def _configurations(module: str) -> list[Any]:
    """The default configurations of a module, those first that know of experts."""
    found = vars(importlib.import_module(module)).values()
    configs = [cls() for cls in found if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedConfig)]
    return sorted(configs, key=lambda config: all(_value(config, name) is None for name in _COUNTS))


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # which layer is meant, asks a configuration whose layers differ
        config.allow_global_per_layer_attribute_access = True
        return getattr(config, name, None)


def experts_classes() -> Iterator[type[nn.Module]]:
    """All classes that the experts interface decorates."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = f"{transformers.models.__path__[0]}/{package.name}"
        for file in pkgutil.iter_modules([folder]):
            if not file.name.startswith("modeling_"):
                continue
            with open(f"{folder}/{file.name}.py", encoding="utf-8") as source:
                text = source.read()
            if _DECORATOR not in text:
                continue
            module = importlib.import_module(f"transformers.models.{package.name}.{file.name}")
            for name in re.findall(rf"^{_DECORATOR}(?:\([^)]*\))?\nclass (\w+)", text, re.MULTILINE):
                yield getattr(module, name)


def make_experts(experts_class: type[nn.Module]) -> nn.Module:
    """With random weights, large enough that clamped gates are clamped."""
    torch.manual_seed(0)
    experts = experts_class(SmallConfig(experts_class))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=1.0)
    return experts


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """``hidden [T, H]``, ``expert ids [T, 2]`` that leave one expert out, and weights; T = 9."""
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(NUM_EXPERTS - 1)[:2] for _ in range(9)])
    return torch.randn(9, HIDDEN_SIZE), ids, torch.rand(9, 2)


def describe(structure: Structure | str) -> tuple[str, str]:
    """How the experts are stored, and what computes their activation."""
    if isinstance(structure, str):
        return "", f"as stock: {structure}"
    layout = "`[E, in, out]`" if structure.transposed else "`[E, out, in]`"
    layout += ", biases" if structure.biased else ""
    if structure.activation is None:
        between = "the module's own code, between two grouped GEMMs"
    else:
        between = f"`{structure.activation}`" + (", gated" if structure.gated else "")
    return layout, between + (", then the module's norm" if structure.normed else "")


def main() -> None:
    rows: dict[tuple[str, str], list[str]] = {}
    for experts_class in experts_classes():
        name = experts_class.__name__.removesuffix("Experts")
        rows.setdefault(describe(structure_of(make_experts(experts_class))), []).append(name)
    print("| experts of | weights | activation |\n| --- | --- | --- |")
    for (layout, between), names in sorted(rows.items(), key=lambda row: -len(row[1])):
        print(f"| {', '.join(sorted(names))} | {layout} | {between} |")


if __name__ == "__main__":
    main()
