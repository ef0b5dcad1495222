"""Tensors of more than 2^31 elements: offsets are 64 bits wide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekernels import ops
from moekernels.ops import reference

WIDTH = 4096
ROWS = 2**31 // WIDTH + 300  # beyond 2^31 elements
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Skips where the GPU is too small, and gives the memory back."""
    needed = 3 * ROWS * WIDTH * DTYPE.itemsize
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def rows(cuda: torch.device) -> torch.Tensor:
    """Row i holds i % 251 in every column: exact in bfloat16, and wrong offsets show."""
    values = (torch.arange(ROWS, device=cuda) % 251).to(DTYPE)
    return values.unsqueeze(1).expand(-1, WIDTH).contiguous()


SAMPLE = [0, 1, ROWS // 2, 2**31 // WIDTH - 1, 2**31 // WIDTH, ROWS - 2, ROWS - 1]


def test_permute(rows: torch.Tensor) -> None:
    backwards = torch.arange(ROWS - 1, -1, -1, device=rows.device, dtype=torch.int32)
    out = ops.permute(rows, backwards)
    assert torch.equal(out[SAMPLE], rows[[ROWS - 1 - i for i in SAMPLE]])


def test_unpermute(rows: torch.Tensor) -> None:
    row_of_slot = torch.arange(ROWS - 1, -1, -1, device=rows.device, dtype=torch.int32).unsqueeze(1)
    out = ops.unpermute(rows, row_of_slot, torch.full((ROWS, 1), 2.0, device=rows.device))
    assert torch.equal(out[SAMPLE], 2 * rows[[ROWS - 1 - i for i in SAMPLE]])


@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_grouped_gemm_reads_far_rows(rows: torch.Tensor, gathered: bool) -> None:
    """Every output is the sum of a row: WIDTH times its value."""
    weight = torch.full((2, 16, WIDTH), 1 / WIDTH, device=rows.device, dtype=DTYPE)
    offsets = torch.tensor([0, ROWS // 3, ROWS], dtype=torch.int32, device=rows.device)
    token_of_row = torch.arange(ROWS, device=rows.device, dtype=torch.int32) if gathered else None
    out = ops.grouped_gemm(rows, weight, offsets, token_of_row=token_of_row)
    assert torch.equal(out[SAMPLE], rows[SAMPLE][:, :16])


def test_grouped_gemm_writes_far_rows(cuda: torch.device) -> None:
    source = torch.randn(ROWS, 8, device=cuda).to(DTYPE)
    weight = torch.randn(2, WIDTH, 8, device=cuda).to(DTYPE)
    offsets = torch.tensor([0, ROWS // 3, ROWS], dtype=torch.int32, device=cuda)
    out = ops.grouped_gemm(source, weight, offsets)
    for i in SAMPLE:
        expert = int(i >= ROWS // 3)
        truth = source[i].float() @ weight[expert].float().T
        torch.testing.assert_close(out[i].float(), truth, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("num_rows", [2, 300])
def test_grouped_gemm_reads_far_weights(cuda: torch.device, num_rows: int) -> None:
    """The last of many experts, by the path for few rows and by the tiled ones."""
    width = 2048
    experts = 2**31 // (width * width) + 2
    weight = torch.zeros(experts, width, width, device=cuda, dtype=DTYPE)
    weight[-1] = torch.randn(width, width, device=cuda).to(DTYPE) / 32
    rows = torch.randn(num_rows, width, device=cuda).to(DTYPE)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=cuda)
    offsets[-1] = num_rows
    out = ops.grouped_gemm(rows, weight, offsets)
    torch.testing.assert_close(out.float(), rows.float() @ weight[-1].float().T, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_weight_gradients_read_far_rows(rows: torch.Tensor, gathered: bool) -> None:
    """The last expert owns the last rows, and the gradient picks one of them."""
    grad_rows = torch.zeros(ROWS, 16, device=rows.device, dtype=DTYPE)
    grad_rows[ROWS - 1, 3] = 1
    offsets = torch.tensor([0, ROWS - 300, ROWS], dtype=torch.int32, device=rows.device)
    token_of_row = torch.arange(ROWS, device=rows.device, dtype=torch.int32) if gathered else None
    grad_weight, _ = ops.grouped_weight_grad(grad_rows, rows, offsets, token_of_row=token_of_row)
    assert torch.equal(grad_weight[1, 3], rows[ROWS - 1])
    assert grad_weight.count_nonzero() == rows[ROWS - 1].count_nonzero()


def test_weight_gradients_are_written_far_away(cuda: torch.device) -> None:
    """The last of many experts is the only one with rows."""
    width = 2048
    experts = 2**31 // (width * width) + 2
    grad_rows, rows = (torch.randn(70, width, device=cuda).to(DTYPE) for _ in range(2))
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=cuda)
    offsets[-1] = 70
    grad_weight, _ = ops.grouped_weight_grad(grad_rows, rows, offsets)
    torch.testing.assert_close(grad_weight[-1].float(), grad_rows.float().T @ rows.float(), rtol=2e-2, atol=4e-2)
    assert not grad_weight[:-1].any()


def test_transposed_weights_far_away(cuda: torch.device) -> None:
    width = 2048
    experts = 2**31 // (width * width) + 2
    weight = torch.zeros(experts, width, width, device=cuda, dtype=DTYPE)
    weight[-1] = torch.randn(width, width, device=cuda).to(DTYPE) / 32
    rows = torch.randn(300, width, device=cuda).to(DTYPE)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=cuda)
    offsets[-1] = 300
    out = ops.grouped_gemm(rows, weight, offsets, transposed=True)
    torch.testing.assert_close(out.float(), rows.float() @ weight[-1].float(), rtol=2e-2, atol=4e-2)


def test_activation(rows: torch.Tensor) -> None:
    out = ops.activation(rows, "relu", gated=True)
    assert torch.equal(out[SAMPLE], (rows[SAMPLE, : WIDTH // 2].float() ** 2).to(DTYPE))


def test_activation_grad(rows: torch.Tensor) -> None:
    grad_linear, scaled, grad_scale = torch.ops.moekernels.activation_grad(rows, rows, "relu", False)
    assert torch.equal(grad_linear[SAMPLE], rows[SAMPLE]) and torch.equal(scaled[SAMPLE], rows[SAMPLE])
    torch.testing.assert_close(grad_scale[SAMPLE], WIDTH * rows[SAMPLE, 0].float() ** 2)


def test_unpermute_grad(rows: torch.Tensor) -> None:
    backwards = torch.arange(ROWS - 1, -1, -1, device=rows.device, dtype=torch.int32)
    grad_rows, grad_weights = torch.ops.moekernels.unpermute_grad(rows, rows, backwards.unsqueeze(1), backwards)
    there = [ROWS - 1 - i for i in SAMPLE]
    assert torch.equal(grad_rows[SAMPLE], rows[there])
    torch.testing.assert_close(grad_weights[SAMPLE, 0], WIDTH * rows[SAMPLE, 0].float() * rows[there, 0].float())


def test_router(cuda: torch.device) -> None:
    """Choices, their gradient, and sums over all tokens."""
    num_experts = 64
    num_tokens = 2**31 // num_experts + 304
    logits = torch.randn(num_tokens, num_experts, device=cuda, dtype=DTYPE)
    last = [0, num_tokens // 2, num_tokens - 305, num_tokens - 304, num_tokens - 1]
    weights, expert_ids = ops.route(logits, 2)
    expected = reference.route(logits[last], 2)
    assert torch.equal(expert_ids[last], expected[1])
    torch.testing.assert_close(weights[last], expected[0])
    grads = torch.randn(num_tokens, 2, device=cuda)
    grad_logits = torch.ops.moekernels.route_grad(grads, logits, expert_ids)
    expected_grad = reference.route_grad(grads[last], logits[last], expert_ids[last])
    torch.testing.assert_close(grad_logits[last], expected_grad)
    del grad_logits

    mask = torch.zeros(num_tokens, device=cuda)
    mask[-1] = 1.0
    stats = ops.router_stats(logits.requires_grad_(), 2, num_groups=2, mask=mask)
    of_last = reference.router_stats(logits.detach()[-1:], 2)
    for actual, expected_sum in zip(stats, of_last, strict=True):
        torch.testing.assert_close(actual[1], expected_sum[0])
        assert not actual[0].any()
    (grad,) = torch.autograd.grad(stats.z_sums.sum(), logits)
    assert grad[-1].any() and not grad[:-1].any()
    assert ops.router_stats(logits.detach(), 2).counts.sum(dtype=torch.float64).item() == 2 * num_tokens
