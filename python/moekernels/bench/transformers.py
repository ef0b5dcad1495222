"""The layers of transformers over our weights: the experts of version 5, the blocks with their routing of version 4.

Each function finds nothing where transformers is not installed, or is the other version.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moekernels.bench.clocks import Run
from moekernels.bench.shapes import LayerInputs, LayerShape

Block = Callable[[Tensor], Any]

BATCHED_MM_MAX_TOKENS = 16  # transformers' batched_mm copies a weight per row
_MASKED_TOKENS_MAX_BYTES = 2 << 30  # NLLB-MoE's block copies all tokens for every expert


def experts(x: LayerInputs, shape: LayerShape) -> dict[str, Run]:
    """The experts module of transformers 5, once per implementation; gated layers without biases only."""
    try:
        olmoe = _modeling("olmoe")
    except ImportError:
        return {}
    if not hasattr(olmoe, "OlmoeExperts") or not shape.gated or shape.bias:
        return {}
    names = ["eager", "grouped_mm"] + (["batched_mm"] if x.hidden.shape[0] <= BATCHED_MM_MAX_TOKENS else [])
    ids = x.expert_ids.long()
    contestants: dict[str, Run] = {}
    for name in names:
        config = olmoe.OlmoeConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_size,
            num_experts=shape.num_experts,
            hidden_act=shape.activation,
        )
        config._experts_implementation = name
        with torch.device("meta"):
            module = olmoe.OlmoeExperts(config)
        # The tensors themselves and no parameters of them, so that gradients reach the inputs.
        for parameter, weight in (("gate_up_proj", x.up_weight), ("down_proj", x.down_weight)):
            delattr(module, parameter)
            setattr(module, parameter, weight)
        contestants[f"transformers {name}"] = lambda module=module: module(  # type: ignore[misc]
            x.hidden, ids, x.expert_weights.to(x.hidden.dtype)
        )
    return contestants


def block(x: LayerInputs, shape: LayerShape, logits: Tensor) -> dict[str, Run]:
    """The block of transformers 4 for layers of that kind, from router logits on; nobody's tokens are dropped."""
    make = _BLOCKS.get((shape.scoring, shape.gated))
    if make is None or shape.activation != ("silu" if shape.gated else "relu"):
        return {}
    try:
        with torch.device("meta"):
            module = make(x, shape, logits)
    except (ImportError, AttributeError, TypeError):  # another version
        return {}
    return {} if module is None else {"transformers 4 block": lambda: module(x.hidden[None])[0][0]}


def _olmoe(x: LayerInputs, shape: LayerShape, logits: Tensor) -> Block:
    modeling = _modeling("olmoe")

    config = modeling.OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    module: Any = modeling.OlmoeSparseMoeBlock(config).eval()
    module.gate = _Given(logits)
    for e, expert in enumerate(module.experts):
        gate, value = x.up_weight[e].chunk(2)
        _put(expert.gate_proj, gate, None)
        _put(expert.up_proj, value, None)
        _put(expert.down_proj, x.down_weight[e], None)
    return module


def _phimoe(x: LayerInputs, shape: LayerShape, logits: Tensor) -> Block:
    modeling = _modeling("phimoe")

    config = modeling.PhimoeConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.ffn_size, num_local_experts=shape.num_experts
    )
    module: Any = modeling.PhimoeSparseMoeBlock(config).eval()
    module.gate = _Given(logits)
    for e, expert in enumerate(module.experts):
        gate, value = x.up_weight[e].chunk(2)
        _put(expert.w1, gate, None)
        _put(expert.w3, value, None)
        _put(expert.w2, x.down_weight[e], None)
    return module


def _nllb_moe(x: LayerInputs, shape: LayerShape, logits: Tensor) -> Block | None:
    modeling = _modeling("nllb_moe")

    if shape.num_experts * x.hidden.numel() * x.hidden.element_size() > _MASKED_TOKENS_MAX_BYTES:
        return None
    config = modeling.NllbMoeConfig(
        d_model=shape.hidden_size,
        num_experts=shape.num_experts,
        moe_eval_capacity_token_fraction=1.0,
        moe_token_dropout=0.0,
        activation_function=shape.activation,
    )
    module: Any = modeling.NllbMoeSparseMLP(config, shape.ffn_size).eval()
    module.router.classifier = _Given(logits.float())
    for e, expert in enumerate(module.experts.values()):
        _put(expert.fc1, x.up_weight[e], None if x.up_bias is None else x.up_bias[e])
        _put(expert.fc2, x.down_weight[e], None if x.down_bias is None else x.down_bias[e])
    return partial(module, padding_mask=None)  # its own default is no mask


def _switch(x: LayerInputs, shape: LayerShape, logits: Tensor) -> Block | None:
    modeling = _modeling("switch_transformers")

    if shape.top_k != 1 or shape.bias:
        return None
    config = modeling.SwitchTransformersConfig(
        d_model=shape.hidden_size,
        d_ff=shape.ffn_size,
        num_experts=shape.num_experts,
        expert_capacity=x.hidden.shape[0],
        dense_act_fn=shape.activation,
    )
    module: Any = modeling.SwitchTransformersSparseMLP(config).eval()
    module.router.classifier = _Given(logits[None].float())
    for e, expert in enumerate(module.experts.values()):
        _put(expert.wi, x.up_weight[e], None)
        _put(expert.wo, x.down_weight[e], None)
    return module


def _modeling(model: str) -> Any:
    return import_module(f"transformers.models.{model}.modeling_{model}")


# By scoring rule, and whether the experts are gated.
_BLOCKS: dict[tuple[str, bool], Callable[[LayerInputs, LayerShape, Tensor], Block | None]] = {
    ("softmax", True): _olmoe,
    ("sparsemixer", True): _phimoe,
    ("top2_gate", False): _nllb_moe,
    ("softmax", False): _switch,
}


def _put(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class _Given(nn.Module):
    """A layer whose output is known."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out
