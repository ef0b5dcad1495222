"""Problems for the tests of the tiled grouped GEMMs, and the check against the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekernels.ops import Swiglu, reference
from tests.simt import params
from tests.simt.device import Settings, SimtLibrary, poisoned
from tests.simt.params import Activation
from tests.tolerance import assert_accurate

NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """One grouped GEMM.

    Attributes:
        counts: the rows of each expert.
        unused: rows behind them.
        padding: elements between the rows of ``rows`` and of ``weight``.
        shift: elements by which both start past a multiple of 16 bytes.
        transposed: ``weight`` is [E, in_features, out_features].
        parts: of each expert, that the weight and the bias come in, each in memory of its own; 0: as stacks.
    """

    counts: tuple[int, ...]
    out_features: int
    in_features: int
    gated: bool = False
    gathered: bool = False
    bias: bool = False
    scaled: bool = False
    activation: str | Swiglu = "none"
    dtype: torch.dtype = torch.bfloat16
    unused: int = 0
    padding: int = 0
    shift: int = 0
    transposed: bool = False
    parts: int = 0

    @property
    def num_rows(self) -> int:
        return sum(self.counts) + self.unused

    @property
    def width(self) -> int:
        return self.out_features // 2 if self.gated else self.out_features


class Tiles(NamedTuple):
    """What a test asks of a launcher."""

    tile_m: int
    stages: int
    group_m: int = 2


@dataclass
class Inputs:
    rows: Tensor
    weight: Tensor
    expert_offsets: Tensor
    bias: Tensor | None
    row_scale: Tensor | None
    token_of_row: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        return replace(
            self,
            rows=self.rows.to(dtype),
            weight=self.weight.to(dtype),
            bias=cast(self.bias),
            row_scale=cast(self.row_scale),
        )

    def reference(self, p: Problem) -> Tensor:
        return reference.grouped_gemm(
            self.rows,
            self.weight.transpose(1, 2) if p.transposed else self.weight,
            self.expert_offsets,
            bias=self.bias,
            activation=p.activation,
            gated=p.gated,
            row_scale=self.row_scale,
            token_of_row=self.token_of_row,
        )


def activation_fields(activation: str | Swiglu) -> dict[str, Any]:
    if isinstance(activation, str):
        return {"activation": Activation[activation.upper()], "swiglu": params.Swiglu()}
    a = activation
    return {"activation": Activation.SWIGLU, "swiglu": params.Swiglu(a.alpha, a.limit, a.shift, a.interleaved)}


def placed(values: Tensor, padding: int, shift: int) -> Tensor:
    """The same values, surrounded by NaN: `padding` elements between rows, `shift` before the first."""
    *outer, width = values.shape
    pitch = width + padding
    rows = values.numel() // max(width, 1)
    storage = torch.full((shift + rows * pitch + 1,), NAN, dtype=values.dtype)
    strides = [pitch * s for s in torch.empty(*outer, device="meta").stride()]
    placed = storage.as_strided((*outer, width), (*strides, 1), shift)
    placed.copy_(values)
    return placed


def make_inputs(p: Problem, seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    num_experts = len(p.counts)
    used = sum(p.counts)
    num_tokens = p.num_rows // 2 + 1 if p.gathered else p.num_rows
    token_of_row = None
    if p.gathered:
        token_of_row = torch.randint(0, num_tokens, (p.num_rows,), dtype=torch.int32, generator=generator)
        token_of_row[used:] = -1
        if used > 3:  # rows of nothing among the others
            token_of_row[used - 2] = -1
            token_of_row[used - 1] = num_tokens
    shape = (p.in_features, p.out_features) if p.transposed else (p.out_features, p.in_features)
    weight = randn(num_experts, *shape) * max(p.in_features, 1) ** -0.5
    return Inputs(
        rows=placed(randn(num_tokens, p.in_features).to(p.dtype), p.padding, p.shift),
        weight=placed(weight.to(p.dtype), p.padding, p.shift),
        expert_offsets=torch.tensor([0, *p.counts]).cumsum(0).int(),
        bias=randn(num_experts, p.out_features + 3).to(p.dtype)[:, : p.out_features] if p.bias else None,
        row_scale=torch.rand(p.num_rows, generator=generator) + 0.5 if p.scaled else None,
        token_of_row=token_of_row,
    )


def experts(p: Problem, inputs: Inputs) -> dict[str, Tensor | list[Tensor] | int | None]:
    """The fields of weight and bias."""
    if p.parts == 0:
        return {
            "weight": inputs.weight,
            "bias": inputs.bias,
            "weight_expert_stride": inputs.weight.stride(0),
            "weight_row_stride": inputs.weight.stride(1),
            "bias_stride": 0 if inputs.bias is None else inputs.bias.stride(0),
            "num_parts": 1,
        }
    parts = inputs.weight.unflatten(1, (p.parts, -1)).flatten(0, 1)
    # No two have the same row stride; where all are to be aligned, they still are.
    paddings = [p.padding + 8 * (i % 3) for i in range(len(parts))]
    return {
        "weight_parts": [placed(part, padding, p.shift) for part, padding in zip(parts, paddings, strict=True)],
        "bias_parts": None if inputs.bias is None else list(inputs.bias.unflatten(1, (p.parts, -1)).flatten(0, 1)),
        "weight_expert_stride": 0,
        "weight_row_stride": 0,
        "bias_stride": 0,
        "num_parts": p.parts,
    }


def other_fields(p: Problem, inputs: Inputs, out: Tensor) -> dict[str, Any]:
    """The fields that say nothing of weight and bias."""
    return {
        "rows": inputs.rows,
        "token_of_row": inputs.token_of_row,
        "row_scale": inputs.row_scale,
        "expert_offsets": inputs.expert_offsets,
        "out": out,
        "num_rows": p.num_rows,
        "num_source_rows": inputs.rows.shape[0],
        "row_stride": inputs.rows.stride(0),
        "out_features": p.out_features,
        "in_features": p.in_features,
        "num_experts": len(p.counts),
        **activation_fields(p.activation),
        "gated": p.gated,
        "transposed": p.transposed,
        "dtype": p.dtype,
    }


def launch(
    library: SimtLibrary,
    p: Problem,
    inputs: Inputs,
    tiles: Tiles | None = None,
    settings: Settings | None = None,
    *,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    fields: dict[str, Tensor | list[Tensor] | int | None] | None = None,
) -> Tensor:
    """The output for these inputs, NaN wherever nothing is written; `tiles` is for kernels/grouped_gemm_path.cu."""
    out = poisoned((p.num_rows, p.width), p.dtype)
    if tiles is not None:
        library.call("set_config", tiles.tile_m, tiles.stages, tiles.group_m)
    library.run(
        "grouped_gemm",
        settings=settings,
        **(experts(p, inputs) if fields is None else fields),
        **other_fields(p, inputs, out),
        allow_tf32=allow_tf32,
        batch_invariant=batch_invariant,
    )
    return out


def check(
    library: SimtLibrary, p: Problem, tiles: Tiles | None = None, settings: Settings | None = None, seed: int = 1
) -> Tensor:
    """Runs a problem, compares it with the definition and returns the output."""
    inputs = make_inputs(p, seed)
    actual = launch(library, p, inputs, tiles, settings)
    # The reference sums in float32 and rounds once, as a kernel should: as strict a bound as there is.
    assert_accurate(actual, inputs.to(torch.float64).reference(p), inputs.reference(p))
    return actual
