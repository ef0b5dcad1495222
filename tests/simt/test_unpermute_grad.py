"""``csrc/cuda/rows/unpermute_grad.cu`` on the CPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.ops import reference
from tests.generators import ROUTINGS
from tests.simt.device import Settings, Simt, SimtLibrary, poisoned
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below, at and above a vector and a warp's step; the last ones take a block per token.
HIDDEN_SIZES = (1, 7, 8, 36, 264, 520, 1032, 2056)


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library("rows/unpermute_grad.cu")


def run(
    library: SimtLibrary,
    grad_out: Tensor,
    rows: Tensor | None,
    row_of_slot: Tensor,
    token_of_row: Tensor,
    weights: Tensor | None = None,
    *,
    with_grad_rows: bool = True,
    grad_rows: Tensor | None = None,
    seed: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_rows [N, H], and grad_weights [T, K] where there are rows."""
    num_rows, hidden_size = token_of_row.shape[0], grad_out.shape[1]
    if with_grad_rows and grad_rows is None:
        grad_rows = poisoned((num_rows, hidden_size), grad_out.dtype)
    grad_weights = None if rows is None else poisoned(tuple(row_of_slot.shape), torch.float32)
    library.run(
        "unpermute_grad",
        settings=Settings(seed=seed),
        grad_out=grad_out,
        rows=rows,
        row_of_slot=row_of_slot,
        token_of_row=token_of_row,
        weights=weights,
        grad_rows=grad_rows,
        grad_weights=grad_weights,
        num_tokens=grad_out.shape[0],
        num_rows=num_rows,
        hidden_size=hidden_size,
        grad_stride=grad_out.stride(0),
        row_stride=0 if rows is None else rows.stride(0),
        top_k=row_of_slot.shape[1],
        dtype=grad_out.dtype,
    )
    return grad_rows, grad_weights


def definition(
    grad_out: Tensor, rows: Tensor, row_of_slot: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slot by slot, in the dtype of the inputs. The last is the size of the terms of grad_weights."""
    grad_rows = torch.zeros_like(rows)
    grad_weights = torch.zeros(row_of_slot.shape, dtype=rows.dtype)
    sizes = torch.zeros_like(grad_weights)
    for t, k in torch.nonzero((row_of_slot >= 0) & (row_of_slot < rows.shape[0])).tolist():
        row = int(row_of_slot[t, k])
        grad_rows[row] = grad_out[t] if weights is None else weights[t, k].to(rows.dtype) * grad_out[t]
        grad_weights[t, k] = grad_out[t] @ rows[row]
        sizes[t, k] = grad_out[t].abs() @ rows[row].abs()
    return grad_rows, grad_weights, sizes


def assert_grads(
    actual: tuple[Tensor | None, Tensor | None],
    grad_out: Tensor,
    rows: Tensor,
    row_of_slot: Tensor,
    weights: Tensor | None,
) -> None:
    truth = definition(grad_out.double(), rows.double(), row_of_slot, weights)
    if actual[0] is not None:
        assert_accurate(actual[0], truth[0], definition(grad_out, rows, row_of_slot, weights)[0])
    if actual[1] is not None:
        plain = definition(grad_out.float(), rows.float(), row_of_slot, weights)
        scale = truth[2].max().item() if truth[2].numel() else 0.0
        assert_accurate(actual[1], truth[1], plain[1], scale=scale)
        assert not actual[1][(row_of_slot < 0) | (row_of_slot >= rows.shape[0])].any()


def problem(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    routing: str = "uniform",
    capacity: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_out, rows, row_of_slot, token_of_row, weights; NaN in the rows that nobody owns."""
    torch.manual_seed(seed)
    plan = reference.plan(ROUTINGS[routing](num_tokens, num_experts, top_k), num_experts, capacity=capacity)
    rows = torch.randn(num_tokens * top_k, hidden_size).to(dtype)
    rows[plan.token_of_row < 0] = float("nan")
    grad_out = torch.randn(num_tokens, hidden_size).to(dtype)
    return grad_out, rows, plan.row_of_slot, plan.token_of_row, torch.randn(num_tokens, top_k)


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_equals_definition(library: SimtLibrary, top_k: int, hidden_size: int) -> None:
    for seed, dtype in enumerate(DTYPES):
        p = problem(6, 9, top_k, hidden_size, dtype, capacity=3 if seed else None, seed=seed)
        grad_out, rows, row_of_slot, token_of_row, weights = p
        actual = run(library, *p, seed=seed)
        assert len(library.launches) == 1
        clean = rows.nan_to_num()
        assert_grads(actual, grad_out, clean, row_of_slot, weights)
        assert actual[0] is not None and not actual[0][token_of_row < 0].any()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (12, 11), (40, 5), (128, 7)])
def test_every_routing(library: SimtLibrary, num_experts: int, top_k: int, routing: str) -> None:
    """More choices than are taken at a time; more rows than a block looks at; most of them dropped."""
    for seed, capacity in enumerate((None, 2)):
        p = problem(40, num_experts, top_k, 24, torch.bfloat16, routing=routing, capacity=capacity, seed=seed)
        actual = run(library, *p, seed=seed)
        assert_grads(actual, p[0], p[1].nan_to_num(), p[2], p[4])


def test_blocks_that_take_a_token_several_times(library: SimtLibrary) -> None:
    """More choices than at a time, in rows of a block: its sums meet in the same place twice."""
    for seed in range(3):
        p = problem(3, 12, 11, 2056, torch.bfloat16, seed=seed)
        assert_grads(run(library, *p, seed=seed), p[0], p[1], p[2], p[4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [24, 25])
def test_any_stride_and_alignment(library: SimtLibrary, hidden_size: int, dtype: torch.dtype) -> None:
    grad_out, rows, row_of_slot, token_of_row, weights = problem(5, 6, 2, hidden_size, dtype)
    expected = run(library, grad_out, rows, row_of_slot, token_of_row, weights)

    def spread(x: Tensor, padding: int, offset: int) -> Tensor:
        space = torch.full((x.shape[0], x.shape[1] + padding + offset), float("nan"), dtype=dtype)
        return space[:, offset : offset + x.shape[1]].copy_(x)

    for padding, offset in ((8, 0), (8, 8), (3, 0), (7, 1)):
        for inputs in ((spread(grad_out, padding, offset), rows), (grad_out, spread(rows, padding, offset))):
            space = poisoned((rows.numel() + offset,), dtype)
            target = space[offset:].view(rows.shape)
            for out in (None, target):
                actual = run(library, *inputs, row_of_slot, token_of_row, weights, grad_rows=out)
                assert torch.equal(actual[0], expected[0])
                torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


def test_one_result_alone(library: SimtLibrary) -> None:
    p = problem(7, 8, 3, 40, torch.float16, capacity=2)
    expected = run(library, *p)
    only_rows = run(library, p[0], None, *p[2:])
    assert only_rows[1] is None and torch.equal(only_rows[0], expected[0])
    only_weights = run(library, *p, with_grad_rows=False)
    assert only_weights[0] is None and torch.equal(only_weights[1], expected[1])
    assert_grads(run(library, *p[:4]), p[0], p[1].nan_to_num(), p[2], None)
    run(library, p[0], None, *p[2:], with_grad_rows=False)
    assert library.launches == []


@pytest.mark.parametrize("hidden_size", [19, 64])
def test_indices_that_do_not_fit_stay_inside(library: SimtLibrary, hidden_size: int) -> None:
    """Slots outside the rows add nothing; a row whose token does not name it, or does not exist, becomes zero."""
    row_of_slot = torch.tensor([[0, -5], [6, 2**31 - 1], [2, 4]], dtype=torch.int32)
    token_of_row = torch.tensor([0, 1, 1, 99, 2, -(2**31)], dtype=torch.int32)
    grad_out, rows = torch.randn(3, hidden_size), torch.randn(6, hidden_size)
    grad_rows, grad_weights = run(library, grad_out, rows, row_of_slot, token_of_row)
    expected = torch.zeros(6, hidden_size)
    expected[0], expected[4] = grad_out[0], grad_out[2]
    assert grad_rows is not None and torch.equal(grad_rows, expected)
    assert_grads((None, grad_weights), grad_out, rows, row_of_slot, None)


def test_the_same_bits_in_every_order_and_batch(library: SimtLibrary) -> None:
    for hidden_size in (264, 2056):
        grad_out, rows, row_of_slot, token_of_row, weights = problem(4, 4, 2, hidden_size, torch.bfloat16)
        expected = run(library, grad_out, rows, row_of_slot, token_of_row, weights)
        assert expected[1] is not None
        for seed in range(3):
            actual = run(library, grad_out, rows, row_of_slot, token_of_row, weights, seed=seed)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        alone = run(library, grad_out[2:3], rows, row_of_slot[2:3], token_of_row, weights[2:3], with_grad_rows=False)
        assert torch.equal(alone[1], expected[1][2:3])


def test_nothing_to_do(library: SimtLibrary) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    run(library, torch.zeros(0, 8), torch.zeros(0, 8), none.view(0, 2), none)
    assert library.launches == []
    # No tokens, but rows; no rows, but tokens; no columns, but sums.
    grad_rows, _ = run(library, torch.zeros(0, 8), torch.zeros(3, 8), none.view(0, 2), torch.tensor([-1, 0, 5]).int())
    assert grad_rows is not None and not grad_rows.any()
    slots = torch.tensor([[0, 1], [-1, 0]], dtype=torch.int32)
    _, grad_weights = run(library, torch.ones(2, 8), torch.zeros(0, 8), slots, none)
    assert grad_weights is not None and not grad_weights.any()
    _, grad_weights = run(library, torch.ones(2, 0), torch.zeros(2, 0), slots, torch.tensor([0, 0]).int())
    assert grad_weights is not None and not grad_weights.any()
