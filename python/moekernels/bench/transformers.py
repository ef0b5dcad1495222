"""The layers of transformers over our weights: the experts of version 5, the blocks with their routing of version 4.

Each function finds nothing where transformers is not installed, or is the other version. Of version 5's blocks Switch's
alone is here: those of gated layers are their experts and little else, and NLLB-MoE's runs no more than two experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moekernels.bench.clocks import Run
from moekernels.bench.shapes import LayerInputs, LayerShape

Block = Callable[[Tensor], Any]

BATCHED_MM_MAX_TOKENS = 16  # transformers' batched_mm copies a weight per row
_MASKED_TOKENS_MAX_BYTES = 2 << 30  # NLLB-MoE's block copies all tokens for every expert


def experts(x: LayerInputs, shape: LayerShape) -> dict[str, Run]:
    """The experts module of transformers 5, once per implementation; gated layers without biases only."""
    if _version() < 5 or not shape.gated or shape.bias:
        return {}
    names = ["eager", "grouped_mm"] + (["batched_mm"] if x.hidden.shape[0] <= BATCHED_MM_MAX_TOKENS else [])
    contestants: dict[str, Run] = {}
    for name in names:
        contestants |= _contestant(f"transformers {name}", partial(_experts, name, x, shape))
    return contestants


def _experts(implementation: str, x: LayerInputs, shape: LayerShape) -> Run:
    olmoe = _modeling("olmoe")
    config = olmoe.OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_experts=shape.num_experts,
        hidden_act=shape.activation,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = olmoe.OlmoeExperts(config)
    # The tensors themselves and no parameters of them, so that gradients reach the inputs.
    for parameter, weight in (("gate_up_proj", x.up_weight), ("down_proj", x.down_weight)):
        delattr(module, parameter)
        setattr(module, parameter, weight)
    ids = x.expert_ids.long()
    return lambda: module(x.hidden, ids, x.routing_weights.to(x.hidden.dtype))


def block(x: LayerInputs, shape: LayerShape, logits: Tensor) -> dict[str, Run]:
    """The block of transformers for layers of that kind, from router logits on; nobody's tokens are dropped."""
    major, make = _version(), _BLOCKS.get((shape.scoring, shape.gated))
    if make is None or shape.activation != ("silu" if shape.gated else "relu"):
        return {}
    if major < 4 or (major > 4 and make is not _switch):
        return {}

    def made() -> Run | None:
        with torch.device("meta"):
            module = make(x, shape, logits)
        return None if module is None else lambda: _hidden(module(x.hidden[None]))[0]

    return _contestant(f"transformers {major} block", made)


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # in version 4 the routing is behind it


def _contestant(name: str, make: Callable[[], Run | None]) -> dict[str, Run]:
    """What is made, if anything; where that fails, as in a version that is not known, a contestant that fails so."""
    try:
        run = make()
    except Exception as error:
        failure = error

        def run() -> NoReturn:
            raise failure

    return {} if run is None else {name: run}


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


def _version() -> int:
    """The major version; 0 without transformers."""
    try:
        return int(version("transformers").partition(".")[0])
    except PackageNotFoundError:
        return 0


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
