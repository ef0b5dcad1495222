"""``csrc/cuda/rows/{permute,unpermute}.cu`` on the CPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.ops import reference
from tests.generators import ROUTINGS
from tests.simt.device import Settings, Simt, SimtLibrary, poisoned
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below, at and above a vector and a warp's piece of a row, in every dtype.
HIDDEN_SIZES = (1, 7, 8, 36, 256, 520, 1032, 2048)


@pytest.fixture(scope="module")
def permuter(simt: Simt) -> SimtLibrary:
    return simt.library("rows/permute.cu", "rows/unpermute.cu")


def run_permute(
    permuter: SimtLibrary,
    hidden: Tensor,
    token_of_row: Tensor,
    *,
    rows: Tensor | None = None,
    settings: Settings | None = None,
) -> Tensor:
    if rows is None:
        rows = poisoned((token_of_row.shape[0], hidden.shape[1]), hidden.dtype)
    permuter.run(
        "permute",
        settings=settings,
        hidden=hidden,
        token_of_row=token_of_row,
        rows=rows,
        num_tokens=hidden.shape[0],
        num_rows=token_of_row.shape[0],
        hidden_size=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        dtype=hidden.dtype,
    )
    return rows


def run_unpermute(
    permuter: SimtLibrary,
    rows: Tensor,
    row_of_slot: Tensor,
    weights: Tensor | None = None,
    *,
    out: Tensor | None = None,
    settings: Settings | None = None,
) -> Tensor:
    if out is None:
        out = poisoned((row_of_slot.shape[0], rows.shape[1]), rows.dtype)
    permuter.run(
        "unpermute",
        settings=settings,
        rows=rows,
        row_of_slot=row_of_slot,
        weights=weights,
        out=out,
        num_tokens=row_of_slot.shape[0],
        num_rows=rows.shape[0],
        hidden_size=rows.shape[1],
        row_stride=rows.stride(0),
        top_k=row_of_slot.shape[1],
        dtype=rows.dtype,
    )
    return out


def assert_unpermutes(actual: Tensor, rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> None:
    truth = reference.unpermute(rows.double(), row_of_slot, weights)
    plain = torch.zeros(actual.shape, dtype=rows.dtype)
    for k in range(row_of_slot.shape[1]):
        taken = reference.permute(rows, row_of_slot[:, k])
        plain = plain + (taken if weights is None else taken * weights[:, k, None].to(rows.dtype))
    assert_accurate(actual, truth, plain)


# ---- permute ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_permute_gathers_rows(permuter: SimtLibrary, hidden_size: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(9, hidden_size).to(dtype)
    for seed, num_rows in enumerate((1, 13, 128, 300 if hidden_size < 1000 else 131)):
        tokens = torch.randint(-2, 12, (num_rows,), dtype=torch.int32)
        tokens[-1] = -(2**31)
        rows = run_permute(permuter, hidden, tokens, settings=Settings(seed=seed))
        assert torch.equal(rows, reference.permute(hidden, tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [64, 66, 67])
def test_permute_at_any_stride_and_alignment(permuter: SimtLibrary, hidden_size: int, dtype: torch.dtype) -> None:
    tokens = torch.tensor([3, 0, -1, 2, 2, 4], dtype=torch.int32)
    base = torch.randn(10, hidden_size + 16).to(dtype)
    out = poisoned((6 * hidden_size + 8,), dtype)
    for offset in (0, 1, 2, 8):
        for hidden in (base[:5, offset : offset + hidden_size], base[::2, offset : offset + hidden_size]):
            expected = reference.permute(hidden, tokens)
            assert torch.equal(run_permute(permuter, hidden, tokens), expected)
            rows = out[offset : offset + 6 * hidden_size].view(6, hidden_size)
            assert torch.equal(run_permute(permuter, hidden, tokens, rows=rows), expected)


def test_permute_keeps_every_bit(permuter: SimtLibrary) -> None:
    """Also of NaN: rows are copied, not computed."""
    hidden = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    rows = run_permute(permuter, hidden, torch.arange(16, dtype=torch.int32))
    assert torch.equal(rows.view(torch.int16), hidden.view(torch.int16))


def test_permute_of_nothing(permuter: SimtLibrary) -> None:
    run_permute(permuter, torch.zeros(3, 8), torch.zeros(0, dtype=torch.int32))
    run_permute(permuter, torch.zeros(3, 0), torch.zeros(4, dtype=torch.int32))
    assert permuter.launches == []
    rows = run_permute(permuter, torch.zeros(0, 8), torch.zeros(4, dtype=torch.int32))
    assert torch.equal(rows, torch.zeros(4, 8))


# ---- un-permute ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_unpermute_sums_the_slots_of_a_token(permuter: SimtLibrary, hidden_size: int, dtype: torch.dtype) -> None:
    for seed, top_k in enumerate((1, 2, 3, 4, 6, 8, 11)):
        num_tokens = 7 if hidden_size < 1000 else 3
        rows = torch.randn(num_tokens * top_k, hidden_size).to(dtype)
        row_of_slot = torch.randperm(num_tokens * top_k).int().view(num_tokens, top_k)
        row_of_slot[torch.rand(num_tokens, top_k) < 0.2] = -1
        weights = torch.rand(num_tokens, top_k) if seed % 2 == 0 else None
        actual = run_unpermute(permuter, rows, row_of_slot, weights, settings=Settings(seed=seed))
        assert_unpermutes(actual, rows, row_of_slot, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpermute_adds_in_order_in_float32(permuter: SimtLibrary, dtype: torch.dtype) -> None:
    """Terms that leave nothing in order and 2^-23 in reverse, or in more precision than float32."""
    terms = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0**-24, 0.0, 0.0, 2.0**-24, -1.0])
    slots = torch.arange(9, dtype=torch.int32).unsqueeze(0)
    for hidden_size in (5, 64):
        rows = terms.to(dtype).unsqueeze(1).repeat(1, hidden_size)
        assert (run_unpermute(permuter, rows, slots) == 0).all()
        assert (run_unpermute(permuter, rows, slots.flip(1).contiguous()) == 2.0**-23).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [64, 66, 67])
def test_unpermute_at_any_stride_and_alignment(permuter: SimtLibrary, hidden_size: int, dtype: torch.dtype) -> None:
    row_of_slot = torch.tensor([[3, 0], [-1, 2], [4, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(4, 2)
    base = torch.randn(10, hidden_size + 16).to(dtype)
    space = poisoned((4 * hidden_size + 8,), dtype)
    for offset in (0, 1, 2, 8):
        for rows in (base[:5, offset : offset + hidden_size], base[::2, offset : offset + hidden_size]):
            assert_unpermutes(run_unpermute(permuter, rows, row_of_slot, weights), rows, row_of_slot, weights)
            out = space[offset : offset + 4 * hidden_size].view(4, hidden_size)
            assert_unpermutes(run_unpermute(permuter, rows, row_of_slot, weights, out=out), rows, row_of_slot, weights)


@pytest.mark.parametrize("hidden_size", [19, 64])
def test_slots_without_a_row_add_nothing(permuter: SimtLibrary, hidden_size: int) -> None:
    """Neither what lies in the rows that nobody owns, nor the weight of a dropped slot."""
    rows = torch.full((6, hidden_size), float("nan"))
    rows[:2] = torch.randn(2, hidden_size)
    row_of_slot = torch.tensor([[-1, 1], [0, -5], [-1, -1], [6, 2**31 - 1]], dtype=torch.int32)
    weights = torch.tensor([[float("nan"), 2.0], [0.5, float("inf")], [1.0, 1.0], [1.0, 1.0]])
    actual = run_unpermute(permuter, rows, row_of_slot, weights)
    assert torch.equal(
        actual, torch.stack([rows[1] * 2, rows[0] / 2, torch.zeros(hidden_size), torch.zeros(hidden_size)])
    )


def test_nan_and_infinity_pass_through(permuter: SimtLibrary) -> None:
    rows = torch.tensor([[float("inf")] * 8, [float("-inf")] * 8, [float("nan")] * 8, [1.0] * 8])
    out = run_unpermute(permuter, rows, torch.tensor([[0, 3], [0, 1], [2, 3], [3, 3]], dtype=torch.int32))
    assert (out[0] == float("inf")).all() and out[1:3].isnan().all() and (out[3] == 2).all()


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_unpermute_undoes_permute(permuter: SimtLibrary, routing: str, top_k: int) -> None:
    hidden = torch.randn(50, 96).bfloat16()
    plan = reference.plan(ROUTINGS[routing](50, 16, top_k), 16)
    rows = run_permute(permuter, hidden, plan.token_of_row)
    weights = torch.full((50, top_k), 1 / top_k)
    assert torch.equal(run_unpermute(permuter, rows, plan.row_of_slot, weights), hidden)


def test_unpermute_of_nothing(permuter: SimtLibrary) -> None:
    run_unpermute(permuter, torch.zeros(3, 8), torch.zeros(0, 2, dtype=torch.int32))
    run_unpermute(permuter, torch.zeros(3, 0), torch.zeros(4, 2, dtype=torch.int32))
    assert permuter.launches == []
    out = run_unpermute(permuter, torch.zeros(0, 8), torch.zeros(4, 2, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(4, 8))
    out = run_unpermute(permuter, torch.zeros(3, 8), torch.zeros(4, 0, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(4, 8))
