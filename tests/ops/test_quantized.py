"""Products with quantised weights against those of their values, in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moekernels
from moekernels import ops
from moekernels._library import _C
from moekernels.nn import GroupedExperts, SparseMLP
from moekernels.ops import _quantized as quantized_products
from moekernels.ops import reference
from moekernels.quantization import QuantizedWeight, bitsandbytes
from tests.robustness.poison import poison_free_memory
from tests.tolerance import assert_accurate

# Whose names their functions have taken.
grouped_gemm_module: Any = importlib.import_module("moekernels.ops.grouped_gemm")
linear_module: Any = importlib.import_module("moekernels.ops.linear")

FORMATS = [
    ("nf4", {}), ("nf4", {"blocksize": 32, "double_quant": True}), ("fp4", {"blocksize": 128}), ("int8", {}),
    ("int4", {}), ("int4", {"group_size": 64}), ("int8_groups", {}), ("q4_0", {}), ("q8_0", {}),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _quantized(*shape: int, format: str = "nf4", **options: object) -> QuantizedWeight:
    return ops.quantize(torch.randn(*shape) / shape[-1] ** 0.5, format, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_linear(format: str, options: dict[str, object], dtype: torch.dtype) -> None:
    weight = _quantized(40, 192, format=format, **options)
    for num_rows in (1, 3, 70):
        input, bias = torch.randn(num_rows, 192).to(dtype), torch.randn(40).to(dtype)
        truth = F.relu(F.linear(input.double(), weight.dequantize(torch.float64), bias.double()))
        plain = F.relu(F.linear(input, weight.dequantize(dtype), bias))
        assert_accurate(ops.linear(input, weight, bias, activation="relu"), truth, plain)


# Widths that end within a block of codes, and that have several groups to a block or several blocks to a group.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "options"), FORMATS[:7])
def test_the_kernel_on_every_instruction_set(
    format: str, options: dict[str, object], dtype: torch.dtype, unit: torch.device
) -> None:
    """And on a GPU, which has one for so few rows."""
    width = max(int(options.get("blocksize", 64)), 64)
    for num_rows, columns, out_features in ((1, width, 4), (2, 3 * width, 7), (8, 5 * width, 33), (11, 2 * width, 70)):
        weight = _quantized(2, out_features, columns, format=format, **options).to(unit)
        assert weight.kernel_layout is not None
        rows, bias = torch.randn(num_rows, columns).to(unit, dtype), torch.randn(2, out_features).to(unit, dtype)
        offsets = torch.tensor([0, 0, num_rows], dtype=torch.int32, device=unit)
        truth = reference.grouped_gemm(rows.double(), weight.dequantize(torch.float64), offsets, bias=bias.double())
        plain = reference.grouped_gemm(rows, weight.dequantize(dtype), offsets, bias=bias)
        poison_free_memory()  # there are no scales for what of a block lies behind its row
        assert_accurate(ops.grouped_gemm(rows, weight, offsets, bias=bias), truth, plain)


# ---- on a GPU: which products are of codes, as far as that can be seen without one; tests/gpu has the rest ----


def test_few_rows_are_those_of_the_grouped_gemm() -> None:
    """What a GPU streams codes past is what it would stream a whole weight past."""
    for num_experts in (1, 2, 8, 64, 1024, 1025):
        for num_rows in (1, 31, 32, 33, 4 * num_experts - 1, 4 * num_experts, 4 * num_experts + 1, 5000):
            tiles = _C.describe_tiles(num_rows=num_rows, out_features=64, in_features=64, num_experts=num_experts)
            assert quantized_products.are_few_rows(num_rows, num_experts) == tiles.startswith("decode"), (
                num_rows,
                num_experts,
            )


class _Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _on_a_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    """Of tensors that have but shapes and devices."""
    parts = {name: _empty(*part.shape, dtype=part.dtype) for name, part in weight.parts.items()}
    return QuantizedWeight(parts, weight.format, weight.shape)


@pytest.fixture
def _a_gpu_is_imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no tensor without memory stays in a cache."""
    monkeypatch.setattr(quantized_products, "_HAS_CUDA", True)
    for module, name in ((linear_module, "one_expert"), (bitsandbytes, "_codes"), (bitsandbytes, "dynamic_map")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


def _ours(calls: _Calls) -> list[str]:
    return [operator.name() for operator in calls.operators if operator.namespace == "moekernels"]


@pytest.mark.usefixtures("_a_gpu_is_imagined")
@pytest.mark.parametrize(("format", "options"), FORMATS[:7])
@pytest.mark.parametrize(
    ("num_rows", "dtype"), [(80, torch.bfloat16), (80, torch.float32), (3000, torch.bfloat16), (3000, torch.float16)]
)
def test_a_gpu_multiplies_by_codes(num_rows: int, dtype: torch.dtype, format: str, options: dict[str, object]) -> None:
    """Without a wait for the device, which such tensors could not answer."""
    stack, matrix = (_quantized(*shape, format=format, **options) for shape in ((20, 8, 128), (8, 128)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _Calls() as calls:
        stack, matrix, offsets = _on_a_gpu(stack), _on_a_gpu(matrix), _empty(21, dtype=torch.int32)
        out = ops.grouped_gemm(_empty(num_rows, 128, dtype=dtype), stack, offsets, gated=True, activation="silu")
        assert out.shape == (num_rows, 4)
        input = _empty(2, 16 if num_rows == 80 else 512, 128, dtype=dtype)
        assert ops.linear(input, matrix, activation="relu").shape == (*input.shape[:-1], 8)
        if dtype != torch.float32:
            grads = _empty(num_rows, 8, dtype=dtype)
            assert ops.grouped_gemm(grads, stack, offsets, transposed=True).shape == (num_rows, 128)
    assert _ours(calls) == (2 if dtype == torch.float32 else 3) * ["moekernels::quantized_gemm"]


@pytest.fixture
def _products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each product from here on, whether it is transposed. The definition stands for the kernel of a GPU."""
    calls: list[bool] = []

    def product(
        rows: Tensor, bias: Tensor | None, row_scale: Tensor | None, expert_offsets: Tensor,
        token_of_row: Tensor | None, weight: QuantizedWeight, out_features: int, transposed: bool,
        activation: str = "none", gated: bool = False,
    ) -> Tensor:  # fmt: skip
        calls.append(transposed)
        stack = weight.dequantize(rows.dtype).view(-1, *weight.shape[-2:])
        out = reference.grouped_gemm(
            rows, stack.transpose(1, 2) if transposed else stack, expert_offsets, bias=bias, activation=activation,
            gated=gated, row_scale=row_scale, token_of_row=token_of_row,
        )  # fmt: skip
        assert out.shape[1] == (out_features // 2 if gated else out_features)
        return out

    monkeypatch.setattr(quantized_products, "_product", product)
    for module in (grouped_gemm_module, linear_module):
        monkeypatch.setattr(module, "has_kernel", lambda *_, **__: True)
    return calls


def _with_gradients(function: Callable[..., Tensor], *leaves: Tensor | None) -> list[Tensor | None]:
    inputs = [None if x is None else x.clone().requires_grad_() for x in leaves]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad(out, [x for x in inputs if x is not None], weights)]


@pytest.mark.parametrize(
    ("activation", "gated", "transposed"),
    [("none", False, False), ("silu", True, False), ("gelu", False, False), ("none", False, True)],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("gathered", [False, True], ids=["", "gathered"])
def test_gradients_of_products_with_codes(
    _products: list[bool], gathered: bool, scaled: bool, activation: str, gated: bool, transposed: bool
) -> None:
    weight = _quantized(3, 64, 128, format="int4")
    width, depth = (128, 64) if transposed else (64, 128)
    rows, scale = torch.randn(6 if gathered else 11, depth), torch.rand(11) if scaled else None
    bias = None if transposed else torch.randn(3, width)
    options: dict[str, Any] = {"activation": activation, "gated": gated, "transposed": transposed}
    if gathered:
        options["token_of_row"] = torch.randint(0, 6, (11,), dtype=torch.int32)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    ours, theirs = (
        _with_gradients(
            lambda rows, bias, scale, weight=weight: ops.grouped_gemm(
                rows, weight, offsets, bias=bias, row_scale=scale, **options
            ),
            rows, bias, scale,
        )
        for weight in (weight, weight.dequantize(torch.float32))
    )  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    again = [transposed] if scaled else []  # what the epilogue was given
    assert _products == [transposed, *again, not transposed]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_of_a_linear_of_codes(_products: list[bool], activation: str) -> None:
    weight, input, bias = _quantized(24, 64, format="int4"), torch.randn(2, 5, 64), torch.randn(24)
    ours, theirs = (
        _with_gradients(lambda x, b, w=w: ops.linear(x, w, b, activation=activation), input, bias)
        for w in (weight, weight.dequantize(torch.float32))
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert _products == [False, True]


@pytest.mark.usefixtures("_a_gpu_is_imagined")
def test_what_a_gpu_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_kernel(
        num_rows: int, columns: int = 48, dtype: torch.dtype = torch.bfloat16, grad: bool = False, **options: bool
    ) -> bool:
        weight = _quantized(8, columns, format="int8")
        with FakeTensorMode(allow_non_fake_inputs=True):
            rows, bias = _empty(num_rows, columns, dtype=dtype), torch.empty(8, requires_grad=grad)
            return quantized_products.has_kernel(_on_a_gpu(weight), rows, bias, num_rows=num_rows, **options)

    for dtype in (torch.bfloat16, torch.float16):
        for num_rows in (1, 32, 33, 5000):
            assert has_kernel(num_rows, dtype=dtype)
            assert has_kernel(num_rows, dtype=dtype, grad=True)
            assert has_kernel(num_rows, dtype=dtype, transposed=True)
            with moekernels.batch_invariant(True):
                assert has_kernel(num_rows, dtype=dtype)
            assert not has_kernel(num_rows, columns=40, dtype=dtype)  # bytes are read 16 at a time
    assert not has_kernel(3, dtype=torch.float64)
    assert has_kernel(32, dtype=torch.float32)
    assert not has_kernel(33, dtype=torch.float32)
    assert not has_kernel(3, dtype=torch.float32, grad=True)
    assert not has_kernel(3, dtype=torch.float32, transposed=True)
    with moekernels.batch_invariant(True):
        assert not has_kernel(3, dtype=torch.float32)
    monkeypatch.setattr(quantized_products, "_HAS_CUDA", False)
    assert not has_kernel(3)


INTEGER_FORMATS = [("int4", {}), ("int4", {"group_size": 64}), ("int8", {}), ("int8_groups", {})]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "options"), INTEGER_FORMATS)
def test_activations_in_8_bits(format: str, options: dict[str, object], dtype: torch.dtype, unit: torch.device) -> None:
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    for num_rows, columns, out_features in ((1, 64, 4), (2, 192, 14), (9, 320, 66), (70, 128, 70)):
        weight = _quantized(2, out_features, columns, format=format, activations="int8", **options)
        rows, bias = torch.randn(num_rows, columns).to(dtype), torch.randn(2, out_features).to(dtype)
        offsets = torch.tensor([0, 0, num_rows], dtype=torch.int32)
        integers, scales = reference.round_rows(rows)
        values = [weight[1].dequantize(wide) for wide in (torch.float64, torch.float32)]
        truth, plain = (
            F.silu(gate) * value
            for w in values
            for gate, value in [((integers.to(w.dtype) @ w.T) * scales.to(w.dtype) + bias[1]).chunk(2, -1)]
        )
        poison_free_memory()
        actual = ops.grouped_gemm(rows, weight, offsets, bias=bias, activation="silu", gated=True)
        assert_accurate(actual, truth, plain.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "options"), INTEGER_FORMATS)
def test_many_rows_in_8_bits(format: str, options: dict[str, object], dtype: torch.dtype, unit: torch.device) -> None:
    """As many as tile registers take, and more than a task has; tiles, groups of rows and of weight rows in part."""
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    for num_rows, columns, out_features in ((5, 64, 16), (16, 320, 30), (33, 448, 48), (96, 64, 17), (230, 192, 140)):
        weight = _quantized(2, out_features, columns, format=format, activations="int8", **options)
        offsets = torch.tensor([0, 3, num_rows + 3], dtype=torch.int32)
        source = torch.randn(num_rows + 9, columns + 8)[:, :columns].to(dtype)
        tokens = torch.arange(num_rows + 3).flip(0).int() // 2
        rows = source[tokens]
        integers, scales = reference.round_rows(rows)
        of_each = [slice(0, 3), slice(3, None)]
        truth, plain = (
            torch.cat([(integers[part].to(w) @ weight[e].dequantize(w).T) * scales[part].to(w)
                       for e, part in enumerate(of_each)])
            for w in (torch.float64, torch.float32)
        )  # fmt: skip
        poison_free_memory()
        assert_accurate(ops.grouped_gemm(source, weight, offsets, token_of_row=tokens), truth, plain.to(dtype))
        with moekernels.batch_invariant(True):
            together = ops.grouped_gemm(rows, weight, offsets)
            alone = ops.grouped_gemm(rows[7:8], weight, torch.tensor([0, 0, 1], dtype=torch.int32))
        assert torch.equal(together[7:8], alone)


def _with_outliers(num_rows: int, columns: int, *places: int) -> Tensor:
    """Normal rows; in some columns every second row is large, of either sign."""
    rows = torch.randn(num_rows, columns).clamp(-5, 5)
    for place in places:
        rows[place % 2 :: 2, place] = 20 * torch.randn(rows[place % 2 :: 2, place].shape).sign() + place % 7
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype: torch.dtype, unit: torch.device) -> None:
    """What stands out of a row is exact, and makes the steps of the others no coarser."""
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    for num_rows, columns, out_features, places in (
        (1, 65, 4, (0, 64)), (2, 37, 14, (36,)), (9, 320, 66, (3, 4, 100, 319)),
        (70, 130, 300, tuple(range(0, 130, 2))), (3, 48, 6, tuple(range(48))), (5, 64, 6, ()),
    ):  # fmt: skip
        weight = _quantized(2, out_features, columns, format="int8", activations="int8")
        rows, bias = _with_outliers(num_rows, columns, *places).to(dtype), torch.randn(2, out_features).to(dtype)
        offsets, scale = torch.tensor([0, 0, num_rows], dtype=torch.int32), torch.rand(num_rows)
        tokens = torch.randperm(num_rows).int()
        rest, outliers = (part[tokens] for part in reference.split_outliers(rows, 6.0))
        integers, scales = reference.round_rows(rest)
        values = [weight[1].dequantize(wide) for wide in (torch.float64, torch.float32)]
        truth, plain = (
            F.silu(gate) * value * scale.to(w.dtype).unsqueeze(1)
            for w in values
            for sums in [(integers.to(w.dtype) @ w.T) * scales.to(w.dtype) + outliers.to(w.dtype) @ w.T]
            for gate, value in [(sums + bias[1]).chunk(2, -1)]
        )
        poison_free_memory()
        actual = ops.grouped_gemm(
            rows, weight, offsets, bias=bias, activation="silu", gated=True, row_scale=scale, token_of_row=tokens
        )
        assert_accurate(actual, truth, plain.to(dtype))
        if places:
            every = QuantizedWeight(weight.parts, "int8", weight.shape, activations="int8", threshold=0)
            rounded = ops.grouped_gemm(
                rows, every, offsets, bias=bias, activation="silu", gated=True, row_scale=scale, token_of_row=tokens
            )
            assert (rounded - truth).norm() > 3 * (actual - truth).norm()


def test_outliers_of_a_row_are_its_own(unit: torch.device) -> None:
    """Its bits do not depend on what stands out in others, nor on NaN and infinities there."""
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    weight = _quantized(40, 256, format="int8", activations="int8")
    rows = _with_outliers(70, 256, *range(0, 256, 3))
    rows[5], rows[6], rows[7, 30], rows[8, 31] = 0, 0.5, torch.nan, torch.inf
    rows[9] = 5.5
    together = ops.linear(rows, weight)
    for row in (0, 1, 5, 6, 7, 8, 9, 69):
        assert torch.equal(
            ops.linear(rows[row : row + 1], weight).nan_to_num(3.0), together[row : row + 1].nan_to_num(3.0)
        )
    assert together[7].isnan().all()
    # An infinity is multiplied as such: its sign is that of the weight.
    column = weight.dequantize(torch.float32)[:, 31]
    expected = torch.where(column == 0, torch.nan, column * torch.inf)
    assert torch.equal(together[8].nan_to_num(3.0), expected.nan_to_num(3.0))
    unbounded = QuantizedWeight(weight.parts, "int8", weight.shape, activations="int8", threshold=0)
    calm = torch.tensor([6, 9])  # below the threshold everywhere
    assert torch.equal(together[calm], ops.linear(rows, unbounded)[calm])
    assert not torch.equal(together[0], ops.linear(rows, unbounded)[0])
    at_it = torch.full((1, 256), 0.01)
    at_it[0, 3] = 6.0  # as large as the threshold stands out
    torch.testing.assert_close(
        ops.linear(at_it, weight), F.linear(at_it, weight.dequantize(torch.float32)), rtol=1e-4, atol=1e-5
    )


def test_integer_sums_are_exact(unit: torch.device) -> None:
    """With a scale for a whole row of the weight the bits are those of the definition, on every instruction set."""
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    for num_rows, columns in ((1, 37), (3, 256), (67, 1000)):
        weight = _quantized(9, columns, format="int8", activations="int8", threshold=0)
        rows = 3 * torch.randn(num_rows, columns)
        integers, scales = reference.round_rows(rows)
        sums = (integers.double() @ weight.parts["codes"].view(9, columns).double().T).float()
        expected = sums * (weight.parts["SCB"] * torch.tensor(1 / 127)) * scales
        assert torch.equal(ops.linear(rows, weight), expected)
        rows[0, columns // 2] = torch.nan
        actual = ops.linear(rows, weight)
        assert actual[0].isnan().all() and torch.equal(actual[1:], expected[1:])


def test_a_format_says_how_activations_are_multiplied() -> None:
    weight, rows = _quantized(8, 64, format="int4", activations="int8"), torch.randn(3, 64)
    assert repr(weight.format) == "Int4(group_size=32, activations='int8')"
    whole = _quantized(8, 64, format="int4")
    assert "activations" not in whole.format.options
    exact = QuantizedWeight(weight.parts, "int4", weight.shape)
    assert not torch.equal(ops.linear(rows, weight), ops.linear(rows, exact))
    torch.testing.assert_close(ops.linear(rows, weight), ops.linear(rows, exact), rtol=0.05, atol=0.05)
    copy = torch.stack([weight, weight])[1]
    assert torch.equal(ops.linear(rows, copy), ops.linear(rows, weight))
    with pytest.raises(ValueError, match="int8: activations must be 'int8' or None, got 'int4'"):
        ops.quantize(torch.randn(4, 4), "int8", activations="int4")
    assert repr(_quantized(4, 4, format="int8", activations="int8").format) == "Int8(activations='int8', threshold=6.0)"
    for options, message in (
        ({"threshold": 5.0}, "int8: threshold goes with activations='int8', got 5.0"),
        ({"activations": "int8", "threshold": -1}, "int8: threshold must be 0 or a positive number, got -1"),
        ({"activations": "int8", "threshold": torch.nan}, "int8: threshold must be 0 or a positive number, got nan"),
        ({"activations": "int8", "threshold": "6"}, "int8: threshold must be 0 or a positive number, got '6'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantize(torch.randn(4, 4), "int8", **options)
    layout = _quantized(4, 64, format="int4", activations="int8").kernel_layout
    assert layout is not None
    for int8_rows, threshold, message in (
        (True, 6.0, "int8_threshold goes with int8_rows, codes in bytes and a scale for each row of the weight"),
        (False, 6.0, "int8_threshold goes with int8_rows"),
        (True, -1.0, "int8_threshold must be 0 or positive, got -1"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moekernels.quantized_gemm(
                rows, layout.codes, layout.scales, [], "halves", 32, 1.0, 4, torch.tensor([0, 3], dtype=torch.int32),
                int8_rows=int8_rows, int8_threshold=threshold,
            )  # fmt: skip
    with pytest.raises(RuntimeError, match="transposed goes with bfloat16 or float16 on CUDA, and with no bias"):
        torch.ops.moekernels.quantized_gemm(
            torch.randn(3, 4), layout.codes, layout.scales, [], "halves", 32, 1.0, 64,
            torch.tensor([0, 3], dtype=torch.int32), transposed=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="nf4 has the options blocksize, double_quant; got 'activations'"):
        ops.quantize(torch.randn(4, 64), "nf4", activations="int8")


def test_odd_widths_of_int8(unit: torch.device) -> None:
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    for num_rows, columns in ((1, 1), (3, 37), (5, 130), (20, 37)):
        weight, rows = _quantized(5, columns, format="int8"), torch.randn(num_rows, columns)
        truth = F.linear(rows.double(), weight.dequantize(torch.float64))
        assert_accurate(ops.linear(rows, weight), truth, F.linear(rows, weight.dequantize(torch.float32)))


def test_unpacked_weights_are_the_dequantised_ones(unit: torch.device) -> None:
    """Rows of the identity give the weight itself."""
    if unit.type != "cpu":
        pytest.skip("the kernel is for CPUs")
    # Some kernels unpack two groups of 32 at a time, of which 96 columns have one more.
    for format, options, columns in (*((*each, 256) for each in FORMATS[:7]), ("int4", {}, 96)):
        weight = _quantized(24, columns, format=format, **options)
        for dtype in (torch.float32, torch.bfloat16):
            actual = ops.linear(torch.eye(columns, dtype=dtype), weight).T
            if format == "int8" or options.get("double_quant"):  # a scale has several factors, rounded once here
                torch.testing.assert_close(actual, weight.dequantize(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
            else:
                assert torch.equal(actual, weight.dequantize(dtype)), (format, dtype)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    weight, rows = _quantized(3, 48, 192, format="nf4", double_quant=True), torch.randn(40, 192).bfloat16()
    with moekernels.batch_invariant(True):
        whole = ops.grouped_gemm(rows, weight, torch.tensor([0, 0, 40, 40], dtype=torch.int32), gated=True)
        for row in (0, 7, 39):
            alone = ops.grouped_gemm(
                rows[row : row + 1], weight, torch.tensor([0, 0, 1, 1], dtype=torch.int32), gated=True
            )
            assert torch.equal(alone[0], whole[row])


def test_blocks_that_cross_rows_have_no_kernel() -> None:
    weight, input = _quantized(6, 96, format="nf4"), torch.randn(3, 96)
    assert weight.kernel_layout is None
    torch.testing.assert_close(ops.linear(input, weight), F.linear(input, weight.dequantize(torch.float32)))


def test_functions_of_torch_take_it() -> None:
    weight, input = _quantized(24, 64, format="int4"), torch.randn(2, 5, 64)
    expected = ops.linear(input, weight)
    assert torch.equal(F.linear(input, weight), expected)
    layer = nn.Linear(64, 24, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("format", "options"), FORMATS[::3])
def test_grouped_gemm(format: str, options: dict[str, object], transposed: bool, dtype: torch.dtype) -> None:
    weight = _quantized(4, 64, 128, format=format, **options)
    offsets = torch.tensor([0, 3, 3, 40, 41], dtype=torch.int32)
    rows = torch.randn(44, 64 if transposed else 128).to(dtype)
    scale = torch.rand(44)
    more = (
        {"transposed": True}
        if transposed
        else {"bias": torch.randn(4, 64).to(dtype), "gated": True, "activation": "silu"}
    )
    doubled = {name: value.double() if isinstance(value, Tensor) else value for name, value in more.items()}
    truth = reference.grouped_gemm(rows.double(), weight.dequantize(torch.float64), offsets, row_scale=scale, **doubled)
    plain = reference.grouped_gemm(rows, weight.dequantize(dtype), offsets, row_scale=scale, **more)
    actual = ops.grouped_gemm(rows, weight, offsets, row_scale=scale, **more)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth)
    else:
        assert_accurate(actual, truth, plain)
    assert actual[41:].count_nonzero() == 0


def _layer(dtype: torch.dtype, bias: bool) -> tuple[SparseMLP, SparseMLP]:
    """A layer, and the same with its experts quantised; the first holds the values of the second."""
    layer = SparseMLP(64, 32, 6, 2, bias=bias, gated=not bias, activation="relu" if bias else "silu").to(dtype)
    quantized = SparseMLP(64, 32, 6, 2, bias=bias, gated=not bias, activation="relu" if bias else "silu").to(dtype)
    quantized.load_state_dict(layer.state_dict())
    for name in (layer.experts._up_name, "down_proj"):
        weight = ops.quantize(getattr(layer.experts, name), "int4")
        setattr(quantized.experts, name, nn.Parameter(weight, requires_grad=False))
        getattr(layer.experts, name).data = weight.dequantize()
    return layer, quantized


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_a_layer_and_its_gradients(num_tokens: int, bias: bool) -> None:
    layer, quantized = _layer(torch.float32, bias)
    if bias:
        for one, other in zip(layer.parameters(), quantized.parameters(), strict=True):
            if one.dim() == 2 and one.shape[0] == 6 and isinstance(layer.experts, GroupedExperts):
                one.data.normal_()
                other.data.copy_(one)
    hidden = torch.randn(num_tokens, 64)
    with torch.no_grad():
        torch.testing.assert_close(quantized(hidden)[0], layer(hidden)[0])
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outputs = [module(input)[0] for module, input in zip((layer, quantized), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    expected = dict(layer.named_parameters())
    for name, parameter in quantized.named_parameters():
        if isinstance(parameter, QuantizedWeight):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_a_graph_keeps_the_codes_alone() -> None:
    weight = _quantized(256, 512)
    input = torch.randn(4, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        out = ops.linear(input, weight)
    assert sum(kept) < weight.numel()
    out.sum().backward()
    torch.testing.assert_close(input.grad, weight.dequantize(torch.float32).sum(0).expand(4, -1))


def test_a_sequence_of_matrices() -> None:
    matrices = [_quantized(32, 64) for _ in range(6)]
    offsets, rows = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.randn(5, 64)
    stack = torch.stack([torch.cat(matrices[i : i + 2]) for i in (0, 2, 4)])
    expected = ops.grouped_gemm(rows, stack, offsets, gated=True, activation="silu")
    torch.testing.assert_close(ops.grouped_gemm(rows, matrices, offsets, gated=True, activation="silu"), expected)


def test_autocast() -> None:
    weight, input = _quantized(24, 64, format="int4"), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear(input, weight)
    assert out.dtype == torch.bfloat16
    assert_accurate(
        out, F.linear(input.double(), weight.dequantize(torch.float64)),
        F.linear(input.bfloat16(), weight.dequantize()),
    )  # fmt: skip


def test_errors() -> None:
    stack, rows = _quantized(2, 24, 64), torch.randn(5, 64)
    for offsets, message in (
        ([0, 2, 3, 5], r"weight must be \[num_experts = 3, N, K\], got \[2, 24, 64\]"),
        ([0, 3, 2], "expert_offsets must"),
        ([0, 3, 6], "expert_offsets must"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.grouped_gemm(rows, stack, torch.tensor(offsets, dtype=torch.int32))
        with pytest.raises(ValueError, match=message):  # and where it is dequantised
            ops.grouped_gemm(rows.double(), stack, torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match="must hold a multiple of num_experts = 2 matrices, got 3"):
        ops.grouped_gemm(rows, [stack[0], stack[1], stack[0]], torch.tensor([0, 2, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"linear: rows must have the in_features of weight, 64, got \[2, 63\]"):
        ops.linear(torch.randn(2, 63), stack[0])
    with pytest.raises(ValueError, match=r"grouped_gemm: rows must have the in_features of weight, 64, got \[5, 63\]"):
        ops.grouped_gemm(rows[:, :63], stack, torch.tensor([0, 2, 5], dtype=torch.int32))
