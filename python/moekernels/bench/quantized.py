"""A layer whose experts are quantised, beside the same with the values that they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.bench import layer
from moekernels.bench.case import Case
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.ops import reference
from moekernels.quantization import QuantizedWeight

FORMATS_TO_MAKE = ("int4", "nf4", "fp4", "int8", "int8_groups", "q4_0", "q8_0")

INTEGER_FORMATS = ("int4", "int8", "int8_groups")
"""Those whose products may be of integers, with rows that are rounded to 8 bits."""

LAYER = "layer"
"""How the names of all rows end, after that of the format."""

WHOLE = "whole weights"
"""The column of the layer with plain weights, in the dtype of the tokens."""

UNROUNDED = "unrounded rows"
"""The column of the layer with the same codes where rows are rounded, without that."""


def row_name(format: str, activations: str | None = None) -> str:
    """How the name of a row ends."""
    return f"{format} {LAYER}" if activations is None else f"{format} {activations}-rows {LAYER}"


def layer_case(x: LayerInputs, shape: LayerShape, format: str, activations: str | None = None) -> Case:
    """The layer after the routing. What it must read are the codes and scales of the experts it visits."""
    options: dict[str, Any] = {} if activations is None else {"activations": activations}
    up, down = (ops.quantize(weight, format, **options) for weight in (x.up_weight, x.down_weight))
    others = {WHOLE: layer.ours(replace(x, up_weight=up.dequantize(), down_weight=down.dequantize()), shape)}
    if activations is not None:
        plain = {
            name: QuantizedWeight(weight.parts, format, weight.shape, dtype=weight.dtype)
            for name, weight in (("up_weight", up), ("down_weight", down))
        }
        others[UNROUNDED] = layer.ours(replace(x, **plain), shape)
    flops, _ = layer.work(x, shape)
    return Case(
        row_name(format, activations),
        layer.ours(replace(x, up_weight=up, down_weight=down), shape),
        others,
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
    layout = up.kernel_layout
    if layout is None or not layout.int8_rows:
        return layer.definition(values, shape, None, dtype)

    def rounded(rows: Tensor) -> Tensor:
        rest, outliers = reference.split_outliers(rows, layout.int8_threshold)
        integers, scales = reference.round_rows(rest)
        return integers * scales.to(rows.dtype) + outliers

    return layer.definition(values, shape, None, dtype, rounded)
