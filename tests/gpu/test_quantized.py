"""Quantised weights on a GPU: rows are multiplied by their codes, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from moekernels.ops._quantized import are_few_rows
from moekernels.quantization import QuantizedWeight
from tests.gpu.graphs import captured
from tests.tolerance import assert_accurate

FORMATS = {
    "int4": ("int4", {}),
    "int4-64": ("int4", {"group_size": 64}),
    "nf4": ("nf4", {}),
    "nf4-nested": ("nf4", {"blocksize": 32, "double_quant": True}),
    "fp4-128": ("fp4", {"blocksize": 128}),
    "int8": ("int8", {}),
    "int8-groups": ("int8_groups", {}),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 2, 9, 0, 0, 16, 2)  # of each expert


def _weight(name: str, *shape: int) -> QuantizedWeight:
    format, options = FORMATS[name]
    return ops.quantize(torch.randn(*shape) / shape[-1] ** 0.5, format, dtype=torch.bfloat16, **options)


def _offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_against_the_cpu_and_the_definition(cuda: torch.device, name: str, dtype: torch.dtype, gated: bool) -> None:
    for counts, out_features, in_features in ((ROWS, 70, 640), ((0, 1) * 4, 2048, 1024), ((1, 0, 29), 1030, 4224)):
        weight = _weight(name, len(counts), out_features, in_features)
        assert are_few_rows(sum(counts) + 2, len(counts))
        rows, bias = torch.randn(sum(counts) + 2, in_features).to(dtype), torch.randn(len(counts), out_features)
        offsets, scale = _offsets(counts), torch.rand(len(rows))
        more = {"activation": "silu", "gated": gated}
        there = ops.grouped_gemm(
            rows.to(cuda), weight.to(cuda), offsets.to(cuda), bias=bias.to(cuda, dtype), row_scale=scale.to(cuda),
            **more,
        ).cpu()  # fmt: skip
        truth, plain = (
            reference.grouped_gemm(
                rows.to(wide), weight.dequantize(wide), offsets, bias=bias.to(dtype).to(wide), row_scale=scale, **more
            )
            for wide in (torch.float64, dtype)
        )
        here = ops.grouped_gemm(rows, weight, offsets, bias=bias.to(dtype), row_scale=scale, **more)
        assert_accurate(there, truth, plain)
        assert_accurate(there, here.double(), plain)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_and_their_gradients(cuda: torch.device, name: str, dtype: torch.dtype) -> None:
    """Against the definition, and against this package's own product with the whole weight."""
    for counts, out_features, in_features, gated in (
        ((0, 130, 1, 300, 0, 64), 70, 640, True),
        ((900, 3, 1200, 0), 2048, 1024, False),
        ((0, 77), 1025, 128, False),  # gradients whose rows are not multiples of 16 bytes
    ):
        weight = _weight(name, len(counts), out_features, in_features).to(cuda)
        whole, offsets = weight.dequantize(dtype), _offsets(counts).to(cuda)
        num_rows, more = sum(counts) + 2, {"activation": "silu" if gated else "none", "gated": gated}
        assert not are_few_rows(num_rows, len(counts))
        rows = torch.randn(num_rows, in_features, device=cuda).to(dtype)
        bias = torch.randn(len(counts), out_features, device=cuda).to(dtype)
        grad_out = torch.randn(num_rows, out_features // (2 if gated else 1), device=cuda).to(dtype)
        results = []
        for multiply, stack, wide in (
            (ops.grouped_gemm, weight, dtype),
            (reference.grouped_gemm, whole.double(), torch.float64),
            (ops.grouped_gemm, whole, dtype),
        ):
            inputs = [x.to(wide).requires_grad_() for x in (rows, bias)]
            out = multiply(inputs[0], stack, offsets, bias=inputs[1], **more)
            results.append([out, *torch.autograd.grad(out, inputs, grad_out.to(wide))])
        for ours, truth, plain in zip(*results, strict=True):
            assert_accurate(ours, truth, plain)


@pytest.mark.parametrize("name", FORMATS)
def test_a_captured_step_of_training(cuda: torch.device, name: str) -> None:
    """Forward and backward, replayed with other rows of other experts."""
    weight = _weight(name, 4, 192, 256).to(cuda)
    rows = torch.randn(300, 256, device=cuda).bfloat16().requires_grad_()
    offsets = _offsets((100, 0, 150, 40)).to(cuda)

    def step() -> Tensor:
        out = ops.grouped_gemm(rows, weight, offsets, activation="silu", gated=True)
        return torch.autograd.grad(out.float().square().sum(), rows)[0]

    graph, grad = captured(step)
    for counts in ((0, 290, 0, 10), (1, 2, 3, 4)):
        rows.data.normal_()
        offsets.copy_(_offsets(counts))
        graph.replay()
        assert torch.equal(grad, step())
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_those_that_dequantize_gives(cuda: torch.device, name: str, dtype: torch.dtype) -> None:
    weight = _weight(name, 64, 24, 128).to(cuda)
    rows = torch.eye(128, device=cuda).to(dtype)
    offsets = torch.tensor([0] * 7 + [128] * 58, dtype=torch.int32, device=cuda)
    actual = ops.grouped_gemm(rows, weight, offsets).T
    expected = weight.dequantize(dtype)[6]
    if name == "int8":  # a scale has two factors, which are multiplied in another order
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_in_any_company(cuda: torch.device, name: str, dtype: torch.dtype) -> None:
    weight = _weight(name, 640, 2048).to(cuda)
    rows = torch.randn(32, 2048, device=cuda).to(dtype)
    together = ops.linear(rows, weight)
    for begin, end in ((0, 1), (1, 3), (3, 12), (12, 32)):
        assert torch.equal(ops.linear(rows[begin:end], weight), together[begin:end])


@pytest.mark.parametrize("name", FORMATS)
def test_a_captured_layer_follows_its_inputs(cuda: torch.device, name: str) -> None:
    """Replayed with other tokens, routed otherwise: the host never learns who has rows."""
    up, down = _weight(name, 16, 2 * 128, 256).to(cuda), _weight(name, 16, 256, 128).to(cuda)
    hidden, logits = torch.randn(4, 256, device=cuda).bfloat16(), torch.randn(4, 16, device=cuda)

    def layer() -> Tensor:
        weights, expert_ids = ops.route(logits, 2)
        return ops.sparse_mlp(hidden, weights, ops.plan(expert_ids, 16), up, down)

    with torch.no_grad():
        graph, out = captured(layer)
        for _ in range(3):
            hidden.normal_()
            logits.normal_()
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, layer())
            assert out.isfinite().all()


def test_rows_and_codes_anywhere(cuda: torch.device) -> None:
    """Neither starts at a multiple of 16 bytes: copies are made."""
    weight, rows = _weight("int4", 40, 128).to(cuda), torch.randn(3, 128, device=cuda).bfloat16()
    expected = ops.linear(rows, weight)
    wide = torch.empty(3, 131, dtype=torch.bfloat16, device=cuda)[:, 3:]
    assert torch.equal(ops.linear(wide.copy_(rows), weight), expected)
    codes = torch.empty(40 * 64 + 1, dtype=torch.uint8, device=cuda)[1:]
    moved = QuantizedWeight({**weight.parts, "codes": codes.copy_(weight.parts["codes"])}, weight.format, weight.shape)
    assert torch.equal(ops.linear(rows, moved), expected)


def test_relu2_is_a_pass_of_its_own(cuda: torch.device) -> None:
    weight, rows = _weight("nf4", 2, 24, 128).to(cuda), torch.randn(5, 128, device=cuda)
    offsets = _offsets((2, 3)).to(cuda)
    for gated in (False, True):
        linear = ops.grouped_gemm(rows, weight, offsets)
        actual = ops.grouped_gemm(rows, weight, offsets, activation="relu2", gated=gated)
        assert torch.equal(actual, ops.activation(linear, "relu2", gated=gated))
