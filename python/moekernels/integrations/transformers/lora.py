"""LoRA on stacks of experts, as PEFT's `ParamWrapper` holds it, without a weight being built.

PEFT adapts ``nn.Parameter``: around a call it puts ``weight + scaling * B @ A`` in the weight's place, which is a stack
of its own and whose gradient is one too. Here the product with the weight stays as it is, and beside it stand two
grouped GEMMs of the adapters' rank (:class:`moekernels.ops._low_rank.LowRank`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moekernels.integrations.transformers.plain import why_not_plain
from moekernels.ops._low_rank import LowRank


def is_wrapper(module: Any) -> bool:
    """Whether it is PEFT's wrapper of a parameter."""
    return any(cls.__name__ == "ParamWrapper" and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def is_adapter(module: Any) -> bool:
    """Whether it is PEFT's, of any kind, around a module or a parameter."""
    return "base_layer" in module._modules and any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def adapters_of(module: Any, transposed: bool) -> tuple[nn.Module, dict[str, LowRank]] | str:
    """What wrappers around a module of experts add to its stacks, or why only PEFT itself can say so.

    Args:
        module: the outermost wrapper, whose own hooks its caller has seen to.
        transposed: whether the stacks are ``[E, in, out]``.

    Returns:
        The module in the wrappers, and by the names of its stacks what is added to them.
    """
    found: dict[str, LowRank] = {}
    outermost = module
    while is_wrapper(module):
        name = module.parameter_name
        if module is not outermost and (reason := why_not_plain(module, type(module))):
            return f"the wrapper of {name} {reason}"
        if module.disable_adapters and module.merged:
            return f"the adapters of {name} are merged and disabled"
        if not module.disable_adapters and not module.merged:
            lora = _lora(module, transposed)
            if isinstance(lora, str):
                return f"the adapter of {name} {lora}"
            if lora is not None:
                found[name] = lora
        module = module.base_layer
    return module, found


def _lora(wrapper: Any, transposed: bool) -> LowRank | str | None:
    """Of the active adapters of one wrapper, one beside the other; None if there are none."""
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not active:
        return None
    if wrapper.num_experts == 1:
        return "has a single expert"
    found: list[LowRank] = []
    for name in active:
        down, up = wrapper.lora_A[name], wrapper.lora_B[name]
        for part, linear in (("lora_A", down), ("lora_B", up)):
            if reason := why_not_plain(linear, nn.Linear):
                return f"{part} {reason}"
        if up.bias is not None:
            return "has a bias"
        rows, columns = down.weight.shape[0], up.weight.shape[1]
        if rows != columns or rows % wrapper.num_experts:
            return (
                f"has no rank: {rows} rows of lora_A and {columns} columns of lora_B for {wrapper.num_experts} experts"
            )
        a = down.weight.unflatten(0, (wrapper.num_experts, -1))  # [E, r, ...]
        b = up.weight.unflatten(1, (-1, wrapper.num_experts)).permute(2, 1, 0)  # [E, r, ...]
        # PEFT before 0.18 takes the second dimension of a stack to be what comes in.
        if getattr(wrapper, "_did_swap_in_out_features", False) is transposed:
            a, b = b, a
        found.append(LowRank(a, b, float(wrapper.scaling[name])))
    if len(found) == 1:
        return found[0]
    firsts, seconds, _ = zip(*found, strict=True)
    scaled = [second * scale for second, scale in zip(seconds, (lora.scale for lora in found), strict=True)]
    return LowRank(torch.cat(firsts, dim=1), torch.cat(scaled, dim=1), 1.0)
