"""float32 GEMMs by tile registers, which multiply bfloat16: three parts of every value make up for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moekernels
from moekernels import ops
from moekernels.ops import reference
from tests.isa import needs_isa
from tests.tolerance import assert_accurate

pytestmark = needs_isa("amx")


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    with moekernels.cpu_isa("amx"):
        yield


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def by_vectors(run: str, *args: Tensor, **options: object) -> object:
    with moekernels.cpu_isa("avx512"):
        return getattr(ops, run)(*args, **options)


def check_all(rows: Tensor, weight: Tensor, grad: Tensor, offsets: Tensor) -> None:
    """The product, the gradient of its rows and that of its weight, beside those of the vector kernels."""
    cases = (("grouped_gemm", (rows, weight), {}), ("grouped_gemm", (grad, weight), {"transposed": True}),
             ("grouped_weight_grad", (grad, rows), {}))  # fmt: skip
    for run, (a, b), options in cases:
        actual, plain = getattr(ops, run)(a, b, offsets, **options), by_vectors(run, a, b, offsets, **options)
        truth = getattr(reference, run)(a.double(), b.double(), offsets, **options)
        if run == "grouped_weight_grad":
            actual, plain, truth = actual[0], plain[0], truth[0]  # type: ignore[index]
        assert_accurate(actual, truth, plain)  # type: ignore[arg-type]


# Rows on both sides of the number from which tiles are used, of each number of groups and of a block; K on both sides
# of a tile and of a chunk; columns that leave groups incomplete.
@pytest.mark.parametrize("counts", [(7, 0, 6), (17, 16, 33), (48, 1, 49), (64, 65, 20), (0, 300, 129)], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 17), (33, 31), (48, 129), (272, 128), (20, 513)])
def test_shapes(counts: tuple[int, ...], out_features: int, in_features: int) -> None:
    num_rows = sum(counts) + 3
    rows, weight = torch.randn(num_rows, in_features), torch.randn(3, out_features, in_features)
    check_all(rows, weight, torch.randn(num_rows, out_features), offsets_of(*counts))


@pytest.mark.parametrize("counts", [(50, 20), (7, 63), (16, 33)], ids=str)
@pytest.mark.parametrize("in_features", [200, 9001])
def test_a_gate_of_odd_width(counts: tuple[int, int], in_features: int) -> None:
    rows, weight, bias = torch.randn(70, in_features), torch.randn(2, 2 * 37, in_features), torch.randn(2, 2 * 37)
    rows /= in_features**0.5
    options = {"activation": "silu", "gated": True}
    actual = ops.grouped_gemm(rows, weight, offsets_of(*counts), bias=bias, **options)
    plain = by_vectors("grouped_gemm", rows, weight, offsets_of(*counts), bias=bias, **options)
    truth = reference.grouped_gemm(rows.double(), weight.double(), offsets_of(*counts), bias=bias.double(), **options)
    assert_accurate(actual, truth, plain)  # type: ignore[arg-type]


def test_gathered_rows_some_of_which_are_missing() -> None:
    rows, weight, scale = torch.randn(30, 129), torch.randn(2, 2 * 20, 129), torch.rand(75)
    tokens = torch.randint(30, (75,), dtype=torch.int32)
    tokens[3] = tokens[40] = tokens[74] = -1
    options = {"activation": "silu", "gated": True, "token_of_row": tokens}
    actual = ops.grouped_gemm(rows, weight, offsets_of(35, 40), row_scale=scale, **options)
    plain = by_vectors("grouped_gemm", rows, weight, offsets_of(35, 40), row_scale=scale, **options)
    truth = reference.grouped_gemm(
        rows.double(), weight.double(), offsets_of(35, 40), row_scale=scale.double(), **options
    )
    assert_accurate(actual, truth, plain)  # type: ignore[arg-type]
    assert not actual[[3, 40, 74]].any()


@pytest.mark.parametrize("in_features", [31, 600])
def test_bits_do_not_depend_on_what_is_computed_beside(in_features: int) -> None:
    rows, weight = torch.randn(130, in_features), torch.randn(1, 90, in_features)
    together = ops.grouped_gemm(rows, weight, offsets_of(130))
    for count in (7, 17, 40, 64, 65):
        few = ops.grouped_gemm(rows[:count], weight[:, 5:47].contiguous(), offsets_of(count))
        assert torch.equal(few, together[:count, 5:47])


def test_rows_too_long_to_be_packed_at_once() -> None:
    rows, weight = torch.randn(60, 9001), torch.randn(1, 40, 9001)
    check_all(rows, weight, torch.randn(60, 40), offsets_of(60))
    check_all(torch.randn(2500, 24), torch.randn(1, 9001, 24)[:, :40], torch.randn(2500, 40), offsets_of(2500))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_magnitudes(scale: float) -> None:
    rows, weight, grad = torch.randn(40, 150) * scale, torch.randn(1, 30, 150) / scale, torch.randn(40, 30) * scale
    check_all(rows, weight, grad, offsets_of(40))


@pytest.mark.parametrize("count", [7, 40])
def test_subnormal_values_count_as_zero_at_worst(count: int) -> None:
    rows, weight = torch.randn(count, 150), torch.randn(1, 30, 150)
    rows[:, ::3] *= 1e-40
    weight[:, 1::5] *= 1e-41
    expected = rows.double() @ weight[0].double().T
    assert_accurate(ops.grouped_gemm(rows, weight, offsets_of(count)), expected, rows @ weight[0].T)
    tiny = ops.grouped_gemm(rows * 1e-40, weight, offsets_of(count))
    assert tiny.isfinite().all() and tiny.abs().max() < 1e-38


def test_every_bit_of_a_value_counts() -> None:
    """One times a value with all 24 bits set, and its neighbours."""
    values = torch.tensor([16777215.0, -16777213.0, 1.0 + 2**-23, -3.4028234e38, 2.0**-100]).repeat(40, 8)
    assert torch.equal(ops.grouped_gemm(values, torch.eye(40).unsqueeze(0), offsets_of(40)), values)
    assert torch.equal(ops.grouped_gemm(torch.eye(40), values.unsqueeze(0), offsets_of(40), transposed=True), values)
    assert torch.equal(ops.grouped_weight_grad(torch.eye(40), values, offsets_of(40))[0][0], values)


def test_infinities_and_nan_stay_what_they_are() -> None:
    rows, weight, grad = torch.randn(40, 60), torch.randn(1, 50, 60), torch.randn(40, 50)
    rows[3, 5], rows[20, 1] = float("inf"), float("nan")
    weight[0, 7, 9] = float("-inf")
    grad[11, 2] = float("inf")
    torch.testing.assert_close(ops.grouped_gemm(rows, weight, offsets_of(40)), rows @ weight[0].T, equal_nan=True)
    for count in (7, 21):  # one and two groups of rows; the value is in the last one
        few = ops.grouped_gemm(rows[21 - count : 21], weight, offsets_of(count))
        torch.testing.assert_close(few, rows[21 - count : 21] @ weight[0].T, equal_nan=True)
    wide = torch.randn(1, 1500, 60)  # several tasks for the same rows
    torch.testing.assert_close(ops.grouped_gemm(rows, wide, offsets_of(40)), rows @ wide[0].T, equal_nan=True)
    transposed = ops.grouped_gemm(grad, weight, offsets_of(40), transposed=True)
    torch.testing.assert_close(transposed, grad @ weight[0], equal_nan=True)
    bias_scale = torch.ones(40)
    actual = ops.grouped_weight_grad(grad, rows, offsets_of(40), bias_scale=bias_scale, need_bias=True)
    torch.testing.assert_close(actual[0][0], grad.T @ rows, equal_nan=True)
    torch.testing.assert_close(actual[1][0], grad.sum(0))


def test_few_rows_are_those_of_the_vector_kernels() -> None:
    rows, weight = torch.randn(6, 300), torch.randn(1, 50, 300)
    assert torch.equal(
        ops.grouped_gemm(rows, weight, offsets_of(6)), by_vectors("grouped_gemm", rows, weight, offsets_of(6))
    )


def test_batch_invariance_on_request() -> None:
    rows, weight = torch.randn(70, 600), torch.randn(1, 90, 600)
    with moekernels.batch_invariant():
        together = ops.grouped_gemm(rows, weight, offsets_of(70))
        for count in (1, 6, 7, 40):
            assert torch.equal(ops.grouped_gemm(rows[:count], weight, offsets_of(count)), together[:count])
