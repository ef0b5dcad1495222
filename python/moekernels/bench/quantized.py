"""A layer whose experts are quantised, beside the same with the values that they stand for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moekernels import ops
from moekernels.bench import layer
from moekernels.bench.case import Case
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.quantization import QuantizedWeight

FORMATS_TO_MAKE = ("int4", "nf4", "fp4", "int8", "int8_groups", "q4_0", "q8_0")

LAYER = "layer"
"""How the names of all rows end, after that of the format."""

WHOLE = "whole weights"
"""The column of the layer with plain weights, in the dtype of the tokens."""


def layer_case(x: LayerInputs, shape: LayerShape, format: str) -> Case:
    """The layer after the routing. What it must read are the codes and scales of the experts it visits."""
    up, down = ops.quantize(x.up_weight, format), ops.quantize(x.down_weight, format)
    whole = replace(x, up_weight=up.dequantize(), down_weight=down.dequantize())
    flops, _ = layer.work(x, shape)
    return Case(
        f"{format} {LAYER}",
        layer.ours(replace(x, up_weight=up, down_weight=down), shape),
        {WHOLE: layer.ours(whole, shape)},
        _bytes(x, up) + _bytes(x, down) + 2 * x.hidden.numel() * x.hidden.element_size(),
        flops,
        definition=lambda dtype: _definition(x, shape, up, down, dtype),
    )


def _bytes(x: LayerInputs, weight: QuantizedWeight) -> float:
    return weight.num_bytes * torch.unique(x.expert_ids).numel() / weight.shape[0]


def _definition(
    x: LayerInputs, shape: LayerShape, up: QuantizedWeight, down: QuantizedWeight, dtype: torch.dtype
) -> Tensor:
    values = replace(x, up_weight=up.dequantize(torch.float32), down_weight=down.dequantize(torch.float32))
    return layer.definition(values, shape, None, dtype)
