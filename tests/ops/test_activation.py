"""A gate with bounds, in the activation op and as the epilogue of a grouped GEMM, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPT_OSS = ops.Swiglu(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
GATES = [GPT_OSS, ops.Swiglu(alpha=1.702, limit=7.0, shift=1.0), ops.Swiglu(limit=2.5), ops.Swiglu()]


def by_hand(gate: ops.Swiglu, linear: Tensor) -> Tensor:
    """As the models' own code writes it, but for `clamp`, whose gradient at a bound is another from torch 2.14 on."""
    first, second = (linear[..., ::2], linear[..., 1::2]) if gate.interleaved else linear.chunk(2, dim=-1)
    first = torch.where(first > gate.limit, gate.limit, first)
    second = torch.where(second.abs() > gate.limit, gate.limit * second.sign(), second)
    return (second + gate.shift) * (first * torch.sigmoid(first * gate.alpha))


def gradient(function: object, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, direction.to(out.dtype))[0]


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_its_gradient(unit: torch.device, dtype: torch.dtype, gate: ops.Swiglu) -> None:
    for width in (1, 3, 16, 37):
        x, direction = (torch.randn(9, 2 * width) * 5).to(unit, dtype), torch.randn(9, width).to(unit, dtype)
        actual = gradient(lambda x: ops.activation(x, gate, gated=True), x, direction)
        truth = gradient(lambda x: reference.activation(x, gate, gated=True), x.double(), direction)
        plain = gradient(lambda x: by_hand(gate, x), x, direction)
        for a, t, p in zip(actual, truth, plain, strict=True):
            assert_accurate(a, t, p)
        torch.testing.assert_close(truth[1], gradient(lambda x: by_hand(gate, x), x.double(), direction)[1])


@pytest.mark.parametrize("in_features", [7, 9])
def test_a_gate_of_transposed_matrices(unit: torch.device, in_features: int) -> None:
    """Gate and value lie beside one another: in_features may be odd, and cut into an odd number of matrices."""
    rows, weight = torch.randn(5, in_features).to(unit), torch.randn(2, in_features, 8).to(unit)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=unit)
    options = {"activation": "silu", "gated": True, "transposed": True}
    truth = reference.grouped_gemm(rows.double(), weight.double(), offsets, **options)
    plain = reference.grouped_gemm(rows, weight, offsets, **options)
    for matrices in (weight, list(weight), [part for matrix in weight for part in matrix.chunk(3)]):
        if not isinstance(matrices, list) or len(matrices) == 2 or in_features == 9:
            assert_accurate(ops.grouped_gemm(rows, matrices, offsets, **options), truth, plain)
    with pytest.raises(ValueError, match="even"):
        ops.grouped_gemm(rows, weight[..., :7].contiguous(), offsets, **options)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(unit: torch.device, dtype: torch.dtype, gate: ops.Swiglu, transposed: bool) -> None:
    rows, bias = (torch.randn(24, 48) * 3).to(unit, dtype), torch.randn(3, 50).to(unit, dtype)
    weight = (torch.randn(3, *((48, 50) if transposed else (50, 48))) * 48**-0.5).to(unit, dtype)
    offsets = torch.tensor([0, 5, 5, 24], dtype=torch.int32, device=unit)
    options = {"activation": gate, "gated": True, "transposed": transposed}
    actual = ops.grouped_gemm(rows, weight, offsets, bias=bias, **options)
    truth = reference.grouped_gemm(rows.double(), weight.double(), offsets, bias=bias.double(), **options)
    matrices = weight.transpose(1, 2) if transposed else weight
    bounds = offsets.tolist()
    linear = [rows[bounds[e] : bounds[e + 1]] @ matrices[e].T + bias[e] for e in range(3)]
    assert_accurate(actual, truth, by_hand(gate, torch.cat(linear)))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_gradients_of_a_whole_layer(transposed: bool) -> None:
    """gpt-oss: interleaved, biased, clamped; its weights as they are stored, or turned."""
    hidden, weights = torch.randn(11, 16), torch.rand(11, 2)
    plan = ops.plan(torch.rand(11, 4).argsort(-1)[:, :2].int(), 4)
    up, down = torch.randn(4, 16, 24), torch.randn(4, 12, 16)
    up, down = (up, down) if transposed else (up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous())
    operands = [hidden, weights, up, down, torch.randn(4, 24), torch.randn(4, 16)]
    gpt_oss = {"activation": GPT_OSS, "gated": True, "transposed": transposed}

    def layer(module: object, x: Tensor, w: Tensor, up: Tensor, down: Tensor, b: Tensor, c: Tensor) -> Tensor:
        rows = module.permute(x, plan.token_of_row, plan.row_of_slot)
        inner = module.grouped_gemm(rows, up, plan.expert_offsets, bias=b, **gpt_oss)
        rows = module.grouped_gemm(inner, down, plan.expert_offsets, bias=c, transposed=transposed)
        return module.unpermute(rows, plan.row_of_slot, w)

    def gradients(module: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        out = layer(module, *leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for got, truth in zip(gradients(ops, torch.float32), gradients(reference, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_sparse_mlp(gate: ops.Swiglu) -> None:
    hidden, weights = torch.randn(11, 16), torch.rand(11, 2)
    plan = ops.plan(torch.rand(11, 4).argsort(-1)[:, :2].int(), 4)
    up, down = torch.randn(4, 24, 16), torch.randn(4, 16, 12)

    def gradients(module: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weights, up, down)]
        out = module.sparse_mlp(leaves[0], leaves[1], plan, *leaves[2:], activation=gate)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    got, truth = gradients(ops, torch.float32), gradients(reference, torch.float64)
    for a, t in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-4 * t.abs().max().item())
    torch.testing.assert_close(ops.sparse_mlp(hidden, weights, plan, up, down, activation=gate), got[0])


def test_without_bounds_it_is_silu() -> None:
    linear = torch.randn(7, 40)
    expected = ops.activation(linear, "silu", gated=True)
    assert torch.equal(ops.activation(linear, ops.Swiglu(), gated=True), expected)


def test_infinite_and_nan() -> None:
    inf, nan = math.inf, math.nan
    linear = torch.tensor([[inf, 1.0, inf, -inf], [nan, 1.0, 1.0, nan], [-90.0, 8.0, -8.0, 1.0]])
    for gate in (ops.Swiglu(limit=7.0, shift=1.0), ops.Swiglu(1.702, 7.0, 1.0, True)):
        actual = ops.activation(linear, gate, gated=True)
        torch.testing.assert_close(actual, by_hand(gate, linear), equal_nan=True)


@pytest.mark.parametrize("fields", [{"limit": 0.0}, {"limit": math.nan}, {"alpha": math.inf}, {"shift": math.nan}])
def test_bounds_that_mean_nothing(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"Swiglu: {next(iter(fields))} must be"):
        ops.Swiglu(**fields)
