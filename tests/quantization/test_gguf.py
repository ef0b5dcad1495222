"""Blocks of GGUF files, and int4, against gguf-py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.quantization import Int4, parse_format

quants = pytest.importorskip("gguf.quants")


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of gguf-py's arithmetic


def _type(name: str) -> object:
    return getattr(quants.GGMLQuantizationType, name.upper())


def _weights() -> list[Tensor]:
    ties = (torch.arange(256) / 2 - 64).repeat(2, 1)
    return [torch.randn(12, 96), torch.zeros(2, 64), torch.randn(20, 64) * 1e4, torch.randn(20, 64) * 1e-39, ties]


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_quantize(name: str) -> None:
    for weight in _weights():
        expected = torch.from_numpy(quants.quantize(weight.numpy(), _type(name)))
        format = parse_format(name)
        parts = format.quantize(weight)
        values = format.dequantize(parts, *weight.shape)
        assert torch.equal(values, torch.from_numpy(quants.dequantize(expected.numpy(), _type(name))))
        if weight.abs().max() == 0 or weight.abs().max() > 1e-30:  # where every scale is 0, codes say nothing
            assert torch.equal(parts["blocks"], expected.view(-1))


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q6_k"])
def test_dequantize(name: str) -> None:
    """Of any bytes at all, so of every code, scale and special value."""
    format = parse_format(name)
    row = 512 // format.group * format.bytes_per_block  # type: ignore[attr-defined]
    blocks = np.random.default_rng(0).integers(0, 256, (64, row), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(blocks, _type(name)))
    actual = format.dequantize({"blocks": torch.from_numpy(blocks).view(-1)}, 64, 512)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))


def test_int4_of_32_has_the_values_of_q4_0() -> None:
    for weight in _weights():
        values = [
            format.dequantize(format.quantize(weight), *weight.shape) for format in (Int4(), parse_format("q4_0"))
        ]
        assert torch.equal(*values)


def test_int4_of_64_is_as_near_as_its_steps() -> None:
    weight = torch.randn(16, 128)
    format = Int4(group_size=64)
    groups = weight.view(-1, 64)
    # There are 8 steps on the side of the largest weight and 7 on the other, where up to one may be cut off.
    step = groups.abs().amax(-1, keepdim=True) / 8
    error = (format.dequantize(format.quantize(weight), 16, 128).view(-1, 64) - groups).abs()
    assert (error <= step * 1.001).all()
    is_inside = groups.abs() <= 7.4 * step
    assert (error <= step * 0.505)[is_inside].all()


def test_a_nan_takes_its_group_along_and_no_other() -> None:
    weight = torch.randn(2, 64)
    weight[1, 40] = torch.nan
    for format in (Int4(), parse_format("q4_0"), parse_format("q8_0")):
        nan = format.dequantize(format.quantize(weight), 2, 64).isnan()
        assert nan[1, 32:].all()
        assert nan.sum() == 32


def test_k_quants_are_only_read() -> None:
    with pytest.raises(ValueError, match="cannot be quantised to q4_k, only read from GGUF files"):
        parse_format("q4_k").quantize(torch.randn(1, 256))


@pytest.mark.parametrize(("name", "apart"), [("q4_0", "int4"), ("q8_0", "int8_groups")])
def test_blocks_taken_apart_have_the_same_values(name: str, apart: str) -> None:
    """And the same as if they had been quantised so."""
    values = torch.randn(3, 8, 96)
    weight = ops.quantize(values, name)
    taken = weight.apart()
    assert (weight.kernel_layout, taken.format.name, taken.num_bytes) == (None, apart, weight.num_bytes)
    assert torch.equal(taken.dequantize(), weight.dequantize())
    assert torch.equal(taken, ops.quantize(values, apart))
    assert torch.equal(weight[1].apart(), taken[1])
    assert taken.apart() is taken
