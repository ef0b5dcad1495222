"""One MoE layer, after the routing (`ops.sparse_mlp`) or from the router's logits on.

On a GPU up to 64 tokens are timed as a CUDA graph of several layers, each with other experts, as a model has them;
more tokens one call at a time, from a cold L2. Baselines after the routing: an eager loop over experts,
torch._grouped_mm, a batched matmul of as many FLOPs, and, where transformers 5 is installed, each of its experts
implementations (if gated). With the routing, which is that of the model the shape comes from, and transformers 4
installed: its block of that model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.bench import baselines as plain
from moekernels.bench import check, transformers
from moekernels.bench.case import Case, say
from moekernels.bench.clocks import Run, in_one_graph
from moekernels.bench.shapes import LayerInputs, LayerShape, router_logits
from moekernels.bench.table import BOUND
from moekernels.ops import Plan, reference

GRAPH_MAX_TOKENS = 64
GRAPH_LAYERS = 8


def ours(x: LayerInputs, shape: LayerShape, logits: Tensor | None = None) -> Run:
    """The layer from router logits on or, without any, from a plan made before."""
    fixed = ops.plan(x.expert_ids, shape.num_experts)

    def run() -> Tensor:
        plan, routing_weights = fixed, x.routing_weights
        if logits is not None:
            routing_weights, expert_ids = ops.route(logits, shape.top_k, **_rule(x, shape))
            plan = ops.plan(expert_ids, shape.num_experts)
        return ops.sparse_mlp(
            x.hidden,
            routing_weights,
            plan,
            x.up_weight,
            x.down_weight,
            up_bias=x.up_bias,
            down_bias=x.down_bias,
            activation=shape.activation,
            gated=shape.gated,
        )

    return run


def baselines(x: LayerInputs, shape: LayerShape) -> dict[str, Run]:
    """Of the layer after the routing."""
    found = {plain.EAGER: plain.eager_loop(x, shape), **transformers.experts(x, shape)}
    if not shape.bias:
        found[plain.GROUPED_MM] = plain.grouped_mm_layer(x, shape)
    return found


def _rule(x: LayerInputs, shape: LayerShape) -> dict[str, Any]:
    """How the model that the shape comes from routes."""
    if shape.scoring == "top2_gate":
        return {"scoring": shape.scoring, "probs_dtype": x.hidden.dtype, "renormalize": True}
    return {"scoring": shape.scoring}


def definition(
    x: LayerInputs,
    shape: LayerShape,
    logits: Tensor | None,
    dtype: torch.dtype,
    rounded: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """What :func:`ours` must return, in a dtype; routing is that of the logits as they are.

    `rounded`: as what rows are multiplied with weights.
    """
    routing_weights, expert_ids = x.routing_weights, x.expert_ids
    if logits is not None:
        routing_weights, expert_ids = reference.route(logits, shape.top_k, **_rule(x, shape))
    rows, plan = expert_rows(x, shape, expert_ids, dtype, rounded)
    return reference.unpermute(rows, plan.row_of_slot, routing_weights)


def expert_rows(
    x: LayerInputs,
    shape: LayerShape,
    expert_ids: Tensor,
    dtype: torch.dtype,
    rounded: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Plan]:
    """By definition: what the experts make of the tokens, ``[T * K, H]`` in expert order, and that order."""
    # Without capacity this is what the definition makes of it, and that one looks at every choice by itself.
    plan = Plan(*(tensor.int() for tensor in plain.plan(expert_ids, shape.num_experts)))
    options: dict[str, Any] = {"activation": shape.activation, "gated": shape.gated}
    hidden = rounded(x.hidden.to(dtype))
    inner = check.grouped_gemm(hidden, x.up_weight, plan, dtype, bias=x.up_bias, gather=True, **options)
    return check.grouped_gemm(rounded(inner), x.down_weight, plan, dtype, bias=x.down_bias), plan


def as_other_layers(x: LayerInputs, shape: LayerShape, count: int) -> list[LayerInputs]:
    """The same weights met by other experts each time, so that one layer's weights do not serve the next from L2."""
    shifted = [(x.expert_ids + i * shape.top_k) % shape.num_experts for i in range(count)]
    return [replace(x, expert_ids=ids) for ids in shifted]


def work(x: LayerInputs, shape: LayerShape) -> tuple[float, float]:
    """FLOPs of the layer, and the bytes it must move: each touched expert's weights once, tokens in and out."""
    flops = 2.0 * x.expert_ids.numel() * shape.expert_size
    touched = torch.unique(x.expert_ids).numel()
    return flops, float(touched * shape.expert_size + 2 * x.hidden.numel()) * x.hidden.element_size()


def layer_case(
    x: LayerInputs, shape: LayerShape, with_routing: bool = False, note: Callable[[str], object] = say
) -> Case:
    logits = router_logits(x, shape) if with_routing else None
    flops, num_bytes = work(x, shape)
    case = Case(
        "layer with routing" if with_routing else "layer",
        ours(x, shape, logits),
        {},
        num_bytes,
        flops,
        definition=lambda dtype: definition(x, shape, logits, dtype),
    )
    if logits is not None:
        case.baselines = transformers.block(x, shape, logits)
    else:
        case.baselines = baselines(x, shape)
    if x.expert_ids.numel() >= shape.num_experts:
        up, down = (plain.batched_matmul(weight, x.expert_ids.numel()) for weight in (x.up_weight, x.down_weight))
        case.bounds[BOUND] = lambda: (up(), down())

    def captured() -> dict[str, Run]:
        layers = as_other_layers(x, shape, GRAPH_LAYERS)
        makers: dict[str, Callable[[LayerInputs], Run]] = {
            "moekernels": lambda y: ours(y, shape, router_logits(y, shape) if with_routing else None),
            plain.GROUPED_MM: lambda y: plain.grouped_mm_layer(y, shape),
        }
        graphs: dict[str, Run] = {}
        for name, make in makers.items():
            if name == "moekernels" or name in case.baselines:
                try:
                    graphs[name] = in_one_graph([make(y) for y in layers], x.hidden.device)
                except RuntimeError as error:
                    if name == "moekernels":
                        raise
                    note(f"{name} cannot be captured: {str(error).partition(chr(10))[0][:150]}")
        return graphs

    if x.hidden.device.type == "cuda" and x.hidden.shape[0] <= GRAPH_MAX_TOKENS:
        case.captured, case.captured_calls = captured, GRAPH_LAYERS
    return case
