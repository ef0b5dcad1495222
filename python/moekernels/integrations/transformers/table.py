"""The table of what takes the place of each MoE module of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from moekernels.integrations.transformers.adapted import in_wrappers, wrapper_swap
from moekernels.integrations.transformers.layers import (
    FusedExperts,
    MixtralBlock,
    NllbBlock,
    NllbExperts,
    OlmoeBlock,
    PhimoeBlock,
    PhimoeRouter,
    Qwen2MoeBlock,
    Qwen3MoeBlock,
    SoftmaxRouter,
    SwitchBlock,
    SwitchExperts,
)
from moekernels.integrations.transformers.lora import is_wrapper
from moekernels.integrations.transformers.outside import DbrxExperts, Llama4Block, LongcatExperts, ParallelExperts
from moekernels.integrations.transformers.swaps import Swap, stock_class

# By the name of the class: blocks of transformers 4, and parts of blocks of any version.
_BLOCKS: dict[str, type[Swap]] = {
    "OlmoeSparseMoeBlock": OlmoeBlock,
    "Qwen3MoeSparseMoeBlock": Qwen3MoeBlock,
    "Qwen2MoeSparseMoeBlock": Qwen2MoeBlock,
    "MixtralSparseMoeBlock": MixtralBlock,
    "PhimoeSparseMoeBlock": PhimoeBlock,
    "SwitchTransformersSparseMLP": SwitchBlock,
    "NllbMoeSparseMLP": NllbBlock,
}
_PARTS: dict[str, type[Swap]] = {
    "OlmoeTopKRouter": SoftmaxRouter,
    "Qwen2MoeTopKRouter": SoftmaxRouter,
    "Qwen3MoeTopKRouter": SoftmaxRouter,
    "MixtralTopKRouter": SoftmaxRouter,
    "PhimoeTopKRouter": PhimoeRouter,
    "SwitchTransformersExperts": SwitchExperts,
    "NllbMoeExperts": NllbExperts,
    "Llama4TextMoe": Llama4Block,
    "DbrxExperts": DbrxExperts,
    "LongcatFlashExperts": LongcatExperts,
    "Step3p7Experts": FusedExperts,
    "JetMoeParallelExperts": ParallelExperts,
    "GraniteMoeParallelExperts": ParallelExperts,
    "GraniteMoeSharedParallelExperts": ParallelExperts,
    "GraniteMoeHybridParallelExperts": ParallelExperts,
}


def swap_for(module: nn.Module) -> type[Swap] | None:
    """What replaces this module; None if it is none that we know."""
    name = stock_class(type(module)).__name__
    if name in _BLOCKS:
        # In transformers 5 the experts are a module with a `forward`, and replaced by themselves.
        experts: Any = module.experts
        return _BLOCKS[name] if stock_class(type(experts)) is nn.Module else None
    if name in _PARTS:
        return _PARTS[name]
    if is_wrapper(module):
        return wrapper_swap(module, swap_for(in_wrappers(module)))
    # Every other model of transformers 5 whose experts follow its experts interface.
    if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
        return FusedExperts
    return None
