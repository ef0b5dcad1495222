from __future__ import annotations

import pytest
import torch

from moekernels import ops
from moekernels.ops import reference
from tests.generators import ROUTINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 64, 257, 2048)


def int32(values: list[int], *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(*shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_there_and_back(device: torch.device, width: int, dtype: torch.dtype) -> None:
    """Un-permuting the permuted tokens multiplies each by its number of choices, exactly for a power of two."""
    hidden = torch.randn(50, width, device=device).to(dtype)
    plan = ops.plan(ROUTINGS["zipf"](50, 16, 4, device), 16)
    assert torch.equal(ops.unpermute(ops.permute(hidden, plan.token_of_row), plan.row_of_slot), hidden * 4)


def test_the_sum_runs_in_order_in_float32(device: torch.device) -> None:
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    slots = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]], dtype=torch.int32, device=device)
    assert ops.unpermute(rows, slots).tolist() == [[1.0], [2.0]]
    # In bfloat16 256 + 1 would round back to 256 at every step.
    rows = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16, device=device)
    slots = torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.int32, device=device)
    assert ops.unpermute(rows, slots).tolist() == [[260.0]]


def test_indices_outside_give_zero(device: torch.device) -> None:
    hidden = torch.ones(3, 5, device=device)
    index = torch.tensor([-1, 2, 3, 1000000, -7, 0], dtype=torch.int32, device=device)
    assert ops.permute(hidden, index).sum(dim=1).tolist() == [0, 5, 0, 0, 0, 5]
    assert ops.unpermute(hidden, index.view(2, 3)).tolist() == [[1.0] * 5, [1.0] * 5]


def test_a_dropped_slot_hides_nothing_and_spreads_nothing(device: torch.device) -> None:
    rows = torch.full((2, 4), float("nan"), device=device)
    rows[1] = 3.0
    slots = torch.tensor([[-1, 1], [-1, -1], [0, 1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[float("nan"), 2.0], [1.0, 1.0], [1.0, 1.0]], device=device)
    out = ops.unpermute(rows, slots, weights)
    assert out[0].tolist() == [6.0] * 4 and out[1].tolist() == [0.0] * 4 and out[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_are_not_contiguous(device: torch.device, dtype: torch.dtype) -> None:
    base = torch.randn(30, 46, device=device).to(dtype)
    slots = torch.randint(-1, 10, (9, 6), dtype=torch.int32, device=device)
    weights = torch.rand(9, 6, device=device)
    for x in (base[:, 1:38], base[::3], base[:10].T[:37].T, base[:, ::2], base[1:, 3:7]):
        index = slots[:, 0]
        assert torch.equal(ops.permute(x, index), reference.permute(x, index))
        actual = ops.unpermute(x, slots[:, ::2], weights[:, ::2])
        expected = ops.unpermute(x.contiguous(), slots[:, ::2].contiguous(), weights[:, ::2].contiguous())
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "permute",
            (torch.zeros(3), int32([0], 1)),
            r"hidden must have 2 dimensions \[num_tokens, hidden_size\], got 1",
        ),
        ("permute", (torch.zeros(3, 4), torch.zeros(3)), "token_of_row must be int32, got float32"),
        ("permute", (torch.zeros(3, 4).int(), int32([0], 1)), "hidden must be float32, bfloat16 or float16, got int32"),
        (
            "unpermute",
            (torch.zeros(3, 4), int32([0], 1)),
            r"row_of_slot must have 2 dimensions \[num_tokens, top_k\], got 1",
        ),
        ("unpermute", (torch.zeros(3, 4), int32([0, 1], 2, 1), torch.zeros(2)), "weights must have 2 dimensions"),
        ("unpermute", (torch.zeros(3, 4), int32([0, 1], 2, 1), torch.zeros(1, 2)), r"= \[2, 1\], got \[1, 2\]"),
        (
            "unpermute",
            (torch.zeros(3, 4), int32([0], 1, 1), torch.zeros(1, 1).half()),
            "weights must be float32, got float16",
        ),
    ],
)
def test_bad_input(function: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::{function}: .*{message}"):
        getattr(ops, function)(*arguments)


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match="token_of_row must be on cpu like hidden, got cuda:0"):
        ops.permute(torch.zeros(3, 4), int32([0], 1).cuda())
