"""nf4, fp4 and int8 against bitsandbytes itself, to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.quantization import FP4, NF4, Int8, parse_format
from tests.quantization.bitsandbytes_values import four_bit_values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")


def _ties(name: str) -> Tensor:
    """Every code, and every value half-way between two, in blocks whose largest is 1."""
    codes = functional.get_4bit_type(name, device="cpu").sort().values
    block = torch.cat([torch.ones(1), codes, (codes[1:] + codes[:-1]) / 2])
    return block.repeat(7).view(7, 32)


def _special() -> Tensor:
    weight = torch.randn(8, 128)
    weight[0, 3], weight[3, 100], weight[4, 1], weight[5] = torch.nan, torch.inf, -torch.inf, 0
    return weight


WEIGHTS = {
    "random": lambda: torch.randn(40, 96),
    "bfloat16": lambda: torch.randn(16, 128).bfloat16(),
    "float16": lambda: torch.randn(16, 128).half(),
    "scales of many sizes": lambda: torch.randn(300, 128) * torch.randn(300, 1).exp(),
    "zeros": lambda: torch.zeros(8, 64),
    "odd": lambda: torch.randn(5, 13),
    "one row": lambda: torch.randn(1, 100),
    "NaN and infinity": _special,
    "subnormal": lambda: torch.randn(8, 64) * 1e-39,
    "ties of nf4": lambda: _ties("nf4"),
    "ties of fp4": lambda: _ties("fp4"),
}


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.isnan(), second.isnan()) and torch.equal(
        first.nan_to_num(0), second.nan_to_num(0)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize(
    ("blocksize", "double_quant"), [(64, False), (64, True), (32, True), (256, False), (4096, True)]
)
def test_four_bits(case: str, name: str, blocksize: int, double_quant: bool) -> None:
    weight = WEIGHTS[case]()
    codes, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=name
    )
    format = parse_format(name, blocksize=blocksize, double_quant=double_quant)
    parts = format.quantize(weight)
    assert torch.equal(parts["codes"], codes.view(-1))
    assert _same(parts["absmax"], state.absmax)
    if double_quant:
        assert _same(parts["nested_absmax"], state.state2.absmax)
        assert _same(parts["offset"], state.offset.expand(parts["offset"].shape))
    values = format.dequantize(parts, *weight.shape).to(weight.dtype)
    assert _same(values, four_bit_values(codes, state).to(weight.dtype))
    if weight.shape[1] % blocksize == 0:  # otherwise it is another on CPUs with AVX-512
        assert _same(values, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("case", WEIGHTS)
def test_int8(case: str) -> None:
    weight = WEIGHTS[case]()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    parts = Int8().quantize(weight)
    assert torch.equal(parts["codes"], codes.view(-1))
    assert _same(parts["SCB"], absmax)
    assert _same(Int8().dequantize(parts, *weight.shape), functional.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("threshold", [3.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_rounded_rows(dtype: torch.dtype, threshold: float) -> None:
    """With a few large columns, as trained models have, ours err no more than those of bitsandbytes' own layer."""
    import bitsandbytes

    weight = torch.randn(96, 512) / 512**0.5
    layer = bitsandbytes.nn.Linear8bitLt(512, 96, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.to("cpu").eval()  # which rounds rows in inference alone
    rows = torch.randn(40, 512).clamp(-2.9, 2.9)
    rows[:, [3, 200, 511]] = 30 * torch.randn(40, 3).sign() + torch.randn(40, 3)
    rows[::3, 77] = 9.0  # in some rows alone
    rows = rows.to(dtype)
    ours = ops.quantize(weight, "int8", dtype=dtype, activations="int8", threshold=threshold)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bfloat16 becomes float16
        theirs = layer(rows)
    assert torch.equal(layer.state.CB.view(-1), ours.parts["codes"])
    exact = rows.double() @ ours.dequantize(torch.float64).T
    error = (ops.linear(rows, ours) - exact).norm() / exact.norm()
    # 1 %: they leave whole columns as they are, we each row's own values.
    assert 0 < error <= 1.01 * (theirs - exact).norm() / exact.norm()
    every = ops.quantize(weight, "int8", dtype=dtype, activations="int8", threshold=0)
    assert error < 0.5 * (ops.linear(rows, every) - exact).norm() / exact.norm()


def test_each_expert_of_a_stack_is_quantised_by_itself() -> None:
    stack = torch.randn(3, 5, 13)
    for format in (NF4(), FP4(double_quant=True), Int8()):
        quantized = ops.quantize(stack, format)
        for expert in range(3):
            assert torch.equal(quantized.dequantize()[expert], ops.quantize(stack[expert], format).dequantize())


@pytest.mark.parametrize("blocksize", [0, 16, 48, 8192])
def test_block_sizes_that_bitsandbytes_refuses(blocksize: int) -> None:
    with pytest.raises(ValueError, match=rf"nf4: blocksize must be one of 32, .*; got {blocksize}"):
        NF4(blocksize=blocksize)
