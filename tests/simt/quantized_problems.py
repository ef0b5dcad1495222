"""Quantised weights for the tests of the grouped GEMMs that read codes, and the check against the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels.quantization import QuantizedWeight
from tests.simt.device import Settings, SimtLibrary, poisoned
from tests.simt.gemm_problems import Inputs, Problem, make_inputs, other_fields
from tests.simt.params import CodeOrder, DType
from tests.tolerance import assert_accurate

# One of each order of codes, and what else there is.
MAIN = {"int4": ("int4", {}), "nf4": ("nf4", {}), "int8": ("int8", {})}
FORMATS = {
    **MAIN,
    "int4-64": ("int4", {"group_size": 64}),
    "nf4-nested": ("nf4", {"blocksize": 32, "double_quant": True}),
    "fp4-128": ("fp4", {"blocksize": 128}),
    "int8-groups": ("int8_groups", {}),
}


def bits_of(name: str) -> int:
    return 8 if name.startswith("int8") else 4


def quantized(inputs: Inputs, name: str) -> QuantizedWeight:
    format, options = FORMATS[name]
    return ops.quantize(inputs.weight, format, **options)


def weight_fields(weight: QuantizedWeight) -> dict[str, Any]:
    layout = weight.kernel_layout
    assert layout is not None
    table, *nested = layout.tables or [None]
    map, factors, offsets = nested or (None, None, None)
    return {
        "codes": layout.codes,
        "scales": layout.scales,
        "table": table,
        "map": map,
        "nested": factors,
        "offset": offsets,
        "codes_stride": layout.codes.stride(0),
        "scales_stride": layout.scales.stride(0),
        "nested_stride": 0 if factors is None else factors.stride(0),
        "group": layout.group,
        "unit": layout.unit,
        "order": CodeOrder[layout.order.upper()],
        "scales_dtype": DType.FLOAT16 if layout.scales.dtype == torch.float16 else DType.FLOAT32,
    }


def launch(
    library: SimtLibrary, p: Problem, inputs: Inputs, weight: QuantizedWeight, settings: Settings | None = None,
    *, int8_rows: bool = False, **changed: Any,
) -> Tensor:  # fmt: skip
    """The output for these inputs, NaN wherever nothing is written. `changed`: fields of the weight."""
    out = poisoned((p.num_rows, p.width), p.dtype)
    gemm = {
        **other_fields(p, inputs, out),
        "bias": inputs.bias,
        "bias_stride": 0 if inputs.bias is None else inputs.bias.stride(0),
        "weight_expert_stride": 0,
        "weight_row_stride": 0,
        "num_parts": 1,
        "allow_tf32": False,
        "batch_invariant": False,
    }
    fields = {"gemm": gemm, "weight": {**weight_fields(weight), **changed}, "int8_rows": int8_rows}
    library.run("quantized_gemm", settings=settings, int8_threshold=0.0, **fields)
    return out


def check(
    library: SimtLibrary, p: Problem, name: str, settings: Settings | None = None, seed: int = 1
) -> tuple[Tensor, QuantizedWeight]:
    """Runs a problem, compares it with the definition on the values of the weight, and returns output and weight."""
    inputs = make_inputs(p, seed)
    weight = quantized(inputs, name)
    actual = launch(library, p, inputs, weight, settings)
    truth = replace(inputs.to(torch.float64), weight=weight.dequantize(torch.float64)).reference(p)
    plain = replace(inputs, weight=weight.dequantize(p.dtype)).reference(p)
    assert_accurate(actual, truth, plain)
    return actual, weight
