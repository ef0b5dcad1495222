from __future__ import annotations

import pytest
import torch

from moekernels import ops
from moekernels.ops import reference
from tests.generators import ROUTINGS


def assert_equals_definition(expert_ids: torch.Tensor, num_experts: int, **options: object) -> ops.Plan:
    actual = ops.plan(expert_ids, num_experts, **options)
    expected = reference.plan(expert_ids, num_experts, **options)
    for name, a, e in zip(ops.Plan._fields, actual, expected, strict=True):
        assert a.dtype == torch.int32 and a.device == expert_ids.device
        assert torch.equal(a, e), name
    return actual


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 64, 8), (700, 64, 8), (1500, 512, 2), (3000, 3, 1)]
)
def test_real_sizes(device: torch.device, num_tokens: int, num_experts: int, top_k: int, routing: str) -> None:
    ids = ROUTINGS[routing](num_tokens, num_experts, top_k, device)
    assert_equals_definition(ids, num_experts)
    assert_equals_definition(ids, num_experts, capacity=max(1, num_tokens * top_k // num_experts))
    assert_equals_definition(ids, num_experts, capacity=5, group_size=100)
    assert_equals_definition(ids, num_experts, capacity=7, priority=torch.rand(num_tokens, device=device))


def test_large_plan_is_a_sorted_permutation(device: torch.device) -> None:
    """Beyond what the definition can do in reasonable time: 2^18 rows."""
    num_tokens, num_experts, top_k = 32768, 64, 8
    ids = ROUTINGS["zipf"](num_tokens, num_experts, top_k, device)
    plan = ops.plan(ids, num_experts)
    order = torch.sort(ids.flatten(), stable=True).indices
    assert torch.equal(plan.token_of_row, (order // top_k).int())
    assert torch.equal(plan.row_of_slot.flatten()[order], torch.arange(order.numel(), device=device).int())
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert torch.equal(plan.expert_offsets[1:], counts.cumsum(0).int())


def test_first_choices_claim_before_second_choices() -> None:
    ids = torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.int32)
    plan = ops.plan(ids, 2, capacity=2)
    # Expert 0: the first choices of tokens 1 and 2 leave no place for token 0's second choice.
    assert plan.row_of_slot.tolist() == [[2, -1], [0, 3], [1, -1]]
    assert plan.expert_offsets.tolist() == [0, 2, 4]
    assert plan.token_of_row.tolist() == [1, 2, 0, 1, -1, -1]


def test_priority_decides_who_is_dropped() -> None:
    ids = torch.zeros(4, 1, dtype=torch.int32)
    plan = ops.plan(ids, 1, capacity=2, priority=torch.tensor([0.1, 0.9, 0.2, 0.9]))
    assert plan.token_of_row.tolist() == [1, 3, -1, -1]


def test_ids_that_are_not_contiguous(device: torch.device) -> None:
    base = ROUTINGS["uniform"](60, 16, 6, device)
    for ids in (base[::3], base[:, ::2], base[:6].T):
        assert_equals_definition(ids, 16, capacity=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(expert_ids=torch.zeros(4, dtype=torch.int32)),
            r"expert_ids must have 2 dimensions \[num_tokens, top_k\], got 1",
        ),
        (dict(expert_ids=torch.zeros(4, 2, dtype=torch.int64)), "expert_ids must be int32, got int64"),
        (dict(num_experts=0), "num_experts must be at least 1, got 0"),
        (dict(capacity=0), "capacity must be at least 1, got 0"),
        (dict(capacity=-3), "capacity must be at least 1, got -3"),
        (dict(capacity=1, group_size=0), "group_size must be at least 1, got 0"),
        (dict(group_size=2), "group_size applies to a capacity, but none was given"),
        (dict(priority=torch.zeros(3), capacity=1), r"token_order must have shape \[num_tokens\] = \[4\], got \[3\]"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::plan: .*{message}"):
        ops.plan(**{"expert_ids": torch.zeros(4, 2, dtype=torch.int32), "num_experts": 3, **arguments})


def test_a_token_order_that_is_no_permutation_corrupts_nothing() -> None:
    """The raw op takes the order unchecked on a GPU, so its kernels must survive a wrong one."""
    ids = torch.zeros(5, 1, dtype=torch.int32)
    order = torch.tensor([7, -2, 100000, 1, 1], dtype=torch.int32)
    offsets, token_of_row, row_of_slot = torch.ops.moekernels.plan(ids, 2, 1, None, order)
    assert 0 <= offsets[-1] <= 5 and ((token_of_row >= -1) & (token_of_row < 5)).all()
    assert ((row_of_slot >= -1) & (row_of_slot < 5)).all()
