"""Problems for the tests of the weight gradients, and the check against the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tests.simt.device import Settings, SimtLibrary, poisoned
from tests.simt.gemm_problems import NAN, placed
from tests.tolerance import assert_accurate


@dataclass(frozen=True)
class WeightGradProblem:
    """One weight gradient.

    Attributes:
        counts: the rows of each expert.
        unused: rows behind them, of NaN.
        padding: elements between the rows of both operands.
        shift: elements by which both start past a multiple of 16 bytes.
    """

    counts: tuple[int, ...]
    out_features: int
    in_features: int
    gathered: bool = False
    grad_gathered: bool = False
    scaled: bool = False
    dtype: torch.dtype = torch.bfloat16
    unused: int = 3
    padding: int = 0
    shift: int = 0

    @property
    def num_rows(self) -> int:
        return sum(self.counts) + self.unused


class Tiles(NamedTuple):
    """What a test asks of a launcher; the paths are those of csrc/cuda/gemm/tile_config.h."""

    path: int
    tile_m: int
    tile_n: int
    stages: int


@dataclass
class Inputs:
    grad_rows: Tensor
    rows: Tensor
    expert_offsets: Tensor
    grad_token_of_row: Tensor | None
    token_of_row: Tensor | None
    bias_scale: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(self, grad_rows=self.grad_rows.to(dtype), rows=self.rows.to(dtype))

    def reference(self) -> tuple[Tensor, Tensor]:
        """grad_weight and grad_bias by the definition, in float64 for float64 and else in float32 and rounded once."""
        dtype = self.grad_rows.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad_rows = _in_order(self.grad_rows, self.grad_token_of_row).to(wide)
        rows = _in_order(self.rows, self.token_of_row).to(wide)
        scaled = grad_rows if self.bias_scale is None else grad_rows * self.bias_scale.to(wide).unsqueeze(1)
        offsets = self.expert_offsets.tolist()
        spans = [slice(*pair) for pair in pairwise(offsets)]
        weight = torch.stack([grad_rows[span].T @ rows[span] for span in spans])
        bias = torch.stack([scaled[span].sum(0) for span in spans])
        return weight.to(dtype), bias.to(dtype)


def _in_order(source: Tensor, token_of_row: Tensor | None) -> Tensor:
    if token_of_row is None:
        return source
    valid = (token_of_row >= 0) & (token_of_row < source.shape[0])
    rows = torch.zeros(token_of_row.shape[0], source.shape[1], dtype=source.dtype)
    rows[valid] = source[token_of_row[valid].long()]
    return rows


def make_inputs(p: WeightGradProblem, seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    used = sum(p.counts)

    def operand(width: int, gathered: bool) -> tuple[Tensor, Tensor | None]:
        num_source_rows = p.num_rows // 2 + 2 if gathered else p.num_rows
        values = torch.randn(num_source_rows, width, generator=generator)
        token_of_row = None
        if gathered:
            values[0] = NAN  # a token that nobody names
            token_of_row = torch.randint(1, num_source_rows, (p.num_rows,), dtype=torch.int32, generator=generator)
            token_of_row[used:] = 0
            if used > 3:  # rows of nothing among the others
                token_of_row[used // 2] = -1
                token_of_row[used - 1] = num_source_rows
        else:
            values[used:] = NAN
        return placed(values.to(p.dtype), p.padding, p.shift), token_of_row

    grad_rows, grad_token_of_row = operand(p.out_features, p.grad_gathered)
    rows, token_of_row = operand(p.in_features, p.gathered)
    bias_scale = torch.rand(p.num_rows, generator=generator) + 0.5 if p.scaled else None
    if bias_scale is not None:
        bias_scale[used:] = NAN
    offsets = torch.tensor([0, *p.counts]).cumsum(0).int()
    return Inputs(grad_rows, rows, offsets, grad_token_of_row, token_of_row, bias_scale)


def launch(
    library: SimtLibrary,
    p: WeightGradProblem,
    inputs: Inputs,
    tiles: Tiles | None = None,
    settings: Settings | None = None,
    *,
    allow_tf32: bool = False,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """grad_weight and grad_bias, NaN wherever nothing is written; with `tiles`, grad_weight alone is."""
    num_experts = len(p.counts)
    grad_weight = poisoned((num_experts, p.out_features, p.in_features), p.dtype)
    grad_bias = poisoned((num_experts, p.out_features), p.dtype)
    library.call("set_config", *(tiles or (-1, 0, 0, 0)))
    library.run(
        "grouped_weight_grad",
        settings=settings,
        grad_rows=inputs.grad_rows,
        rows=inputs.rows,
        grad_token_of_row=inputs.grad_token_of_row,
        token_of_row=inputs.token_of_row,
        bias_scale=inputs.bias_scale,
        expert_offsets=inputs.expert_offsets,
        grad_weight=grad_weight if need_weight else None,
        grad_bias=grad_bias,
        num_rows=p.num_rows,
        num_source_grad_rows=inputs.grad_rows.shape[0],
        num_source_rows=inputs.rows.shape[0],
        grad_row_stride=inputs.grad_rows.stride(0),
        row_stride=inputs.rows.stride(0),
        out_features=p.out_features,
        in_features=p.in_features,
        num_experts=num_experts,
        allow_tf32=allow_tf32,
        dtype=p.dtype,
    )
    return grad_weight, grad_bias


def check(
    library: SimtLibrary,
    p: WeightGradProblem,
    tiles: Tiles | None = None,
    settings: Settings | None = None,
    seed: int = 1,
) -> Tensor:
    """Runs a problem, compares it with the definition and returns grad_weight."""
    inputs = make_inputs(p, seed)
    grad_weight, grad_bias = launch(library, p, inputs, tiles, settings)
    truth, plain = inputs.to(torch.float64).reference(), inputs.reference()
    assert_accurate(grad_weight, truth[0], plain[0])
    if tiles is None:
        assert_accurate(grad_bias, truth[1], plain[1])
    return grad_weight
