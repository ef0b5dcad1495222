"""The grouped GEMM by transposed weights and the weight gradients: every path against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from tests.gpu.graphs import captured

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of each expert: an empty one, one that ends inside every tile, one with nearly all rows.
RAGGED = (0, 1, 65, 0, 700, 128, 3)
# Two that begin on 16 bytes, one that does not: the paths of tensor cores with and without TMA.
SIZES = ((512, 384), (136, 264), (37, 51))


@dataclass
class Backward:
    """What the gradients of one projection are made of; rows past the last expert's hold NaN."""

    grad_rows: Tensor  # [N, M]
    rows: Tensor  # [N, K]
    weight: Tensor  # [E, M, K]
    expert_offsets: Tensor
    scale: Tensor  # [N] float32

    @classmethod
    def random(cls, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Backward:
        torch.manual_seed(seed)
        num_rows = sum(RAGGED) + 40

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        made = cls(
            randn(num_rows, sizes[0]),
            randn(num_rows, sizes[1]),
            randn(len(RAGGED), *sizes) / sizes[0] ** 0.5,
            torch.tensor([0, *RAGGED], device=device).cumsum(0).int(),
            torch.rand(num_rows, device=device) + 0.5,
        )
        for tensor in (made.grad_rows, made.rows, made.scale):
            tensor[sum(RAGGED) :] = float("nan")
        return made

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows, weight and bias in float64, on the CPU."""
        grad_rows, rows, weight = (x.double().cpu() for x in (self.grad_rows, self.rows, self.weight))
        offsets, scale = self.expert_offsets.cpu(), self.scale.cpu()
        of_rows = reference.grouped_gemm(grad_rows, weight, offsets, row_scale=scale, transposed=True)
        of_weight, of_bias = reference.grouped_weight_grad(grad_rows, rows, offsets, bias_scale=scale, need_bias=True)
        return of_rows, of_weight, of_bias

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = ops.grouped_gemm(
            self.grad_rows, self.weight, self.expert_offsets, row_scale=self.scale, transposed=True
        )
        of_weight, of_bias = ops.grouped_weight_grad(
            self.grad_rows, self.rows, self.expert_offsets, bias_scale=self.scale, need_bias=True
        )
        return of_rows, of_weight, of_bias


def assert_close(actual: Tensor, truth: Tensor) -> None:
    """Sums in float32, rounded once."""
    roundings = 64 if actual.dtype == torch.float32 else 2
    allowed = roundings * torch.finfo(actual.dtype).eps * max(truth.abs().max().item(), 1.0)
    assert (actual.cpu().double() - truth).abs().max().item() <= allowed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(cuda: torch.device, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x = Backward.random(sizes, dtype, cuda)
    for actual, truth in zip(x.run(), x.truth(), strict=True):
        assert_close(actual, truth)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["rows", "grad", "both"])
def test_gathered_operands(cuda: torch.device, which: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """An operand found through an index gives the bits of the same rows in order."""
    x = Backward.random(sizes, dtype, cuda)
    order = torch.randperm(x.rows.shape[0], device=cuda)
    tokens = order.argsort().int()
    gathered = {}
    rows, grad_rows = x.rows, x.grad_rows
    if which != "grad":
        rows, gathered["token_of_row"] = rows[order], tokens
    if which != "rows":
        grad_rows, gathered["grad_token_of_row"] = grad_rows[order], tokens
    expected = ops.grouped_weight_grad(x.grad_rows, x.rows, x.expert_offsets, need_bias=True)
    actual = ops.grouped_weight_grad(grad_rows, rows, x.expert_offsets, need_bias=True, **gathered)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs(cuda: torch.device, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x = Backward.random(sizes, dtype, cuda)
    first = x.run()
    noise = torch.randn(2048, 2048, device=cuda)
    for _ in range(20):
        noise = noise @ noise / 50  # other work, so that blocks come and go in another order
        assert all(torch.equal(a, b) for a, b in zip(x.run(), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_backward_follows_its_offsets(cuda: torch.device, dtype: torch.dtype) -> None:
    """How many rows each expert has is read on the device: one graph serves every routing."""
    x = Backward.random(SIZES[0], dtype, cuda)
    for tensor in (x.grad_rows, x.rows, x.scale):
        tensor.nan_to_num_(nan=1.0)
    graph, results = captured(x.run)
    num_rows = x.rows.shape[0]
    for counts in (RAGGED, (num_rows, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, num_rows), (0,) * 7, (9,) * 7):
        x.expert_offsets.copy_(torch.tensor([0, *counts]).cumsum(0).int())
        for tensor in results:
            tensor.fill_(float("nan"))
        graph.replay()
        for actual, truth, eager in zip(results, x.truth(), x.run(), strict=True):
            assert_close(actual, truth)
            assert torch.equal(actual, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_finite_stays_with_its_expert(cuda: torch.device, dtype: torch.dtype) -> None:
    x = Backward.random(SIZES[0], dtype, cuda)
    _, expected, _ = x.run()
    begin, end = x.expert_offsets[4:6].tolist()
    x.rows[begin] = float("nan")
    x.grad_rows[end - 1] = float("inf")
    _, actual, _ = x.run()
    others = torch.arange(len(RAGGED), device=cuda) != 4
    assert not actual[4].isfinite().any()
    assert torch.equal(actual[others], expected[others])


def test_offsets_that_do_not_fit_stay_inside(cuda: torch.device) -> None:
    """The result is arbitrary, the memory is safe."""
    grad_rows, rows = torch.randn(40, 48, device=cuda), torch.randn(40, 64, device=cuda)
    weight = torch.randn(2, 48, 64, device=cuda)
    for dtype in (torch.bfloat16, torch.float32):
        for offsets in ([-5, 10, 2**31 - 1], [100, 7, -3], [2**31 - 1, -(2**31), 2**31 - 1]):
            on_device = torch.tensor(offsets, dtype=torch.int32, device=cuda)
            ops.grouped_weight_grad(grad_rows.to(dtype), rows.to(dtype), on_device, need_bias=True)
            ops.grouped_gemm(grad_rows.to(dtype), weight.to(dtype), on_device, transposed=True)
    torch.cuda.synchronize()
