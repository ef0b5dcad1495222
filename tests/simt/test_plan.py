"""``csrc/cuda/routing/plan.cu`` on the CPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.ops import Plan, reference
from tests.generators import ROUTINGS
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned


@pytest.fixture(scope="module")
def planner(simt: Simt) -> SimtLibrary:
    return simt.library("routing/plan.cu")


def run_plan(
    planner: SimtLibrary,
    expert_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    group_size: int | None = None,
    token_order: Tensor | None = None,
    settings: Settings | None = None,
) -> Plan:
    num_tokens, top_k = expert_ids.shape
    outputs = Plan(
        torch.full((num_experts + 1,), -7, dtype=torch.int32),
        torch.full((num_tokens * top_k,), -7, dtype=torch.int32),
        torch.full((num_tokens, top_k), -7, dtype=torch.int32),
    )
    inputs = dict(
        expert_ids=expert_ids,
        token_order=token_order,
        num_tokens=num_tokens,
        capacity=-1 if capacity is None else capacity,
        group_size=max(num_tokens, 1) if group_size is None else group_size,
        num_experts=num_experts,
        top_k=top_k,
    )
    planner.run(
        "plan",
        settings=settings,
        **inputs,
        **outputs._asdict(),
        # Indices far outside of everything, where somebody should read before writing.
        workspace=torch.full((planner.workspace_bytes("plan", **inputs),), 0x7F, dtype=torch.uint8),
    )
    return outputs


def assert_same_plan(actual: Plan, expected: Plan) -> None:
    for name, a, e in zip(Plan._fields, actual, expected, strict=True):
        assert torch.equal(a, e), name


def assert_equals_definition(
    planner: SimtLibrary,
    expert_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    group_size: int | None = None,
    priority: Tensor | None = None,
    seed: int = 1,
) -> None:
    order = None if priority is None else torch.argsort(priority, descending=True, stable=True).int()
    actual = run_plan(
        planner,
        expert_ids,
        num_experts,
        capacity=capacity,
        group_size=group_size,
        token_order=order,
        settings=Settings(seed=seed),
    )
    expected = reference.plan(expert_ids, num_experts, capacity=capacity, group_size=group_size, priority=priority)
    assert_same_plan(actual, expected)


def with_strays(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Some ids that name no expert."""
    strays = torch.tensor([-1, num_experts, -(2**31), 2**31 - 1], dtype=torch.int32)
    chosen = torch.rand(expert_ids.shape) < 0.2
    return torch.where(chosen, strays[torch.randint(4, expert_ids.shape)], expert_ids)


# ---- one block: 256 threads up to 1024 slots, 1024 threads up to 4096 ----


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 64, 8), (13, 5, 3), (128, 64, 8), (300, 1, 1), (37, 1030, 2), (512, 64, 8)],
)
def test_small_batches_take_one_launch(
    planner: SimtLibrary, num_tokens: int, num_experts: int, top_k: int, routing: str
) -> None:
    ids = ROUTINGS[routing](num_tokens, num_experts, top_k)
    share = max(1, num_tokens * top_k // num_experts)
    for seed in (0, 1):
        assert_equals_definition(planner, ids, num_experts, seed=seed)
        assert len(planner.launches) == 1 and "<<<(1, 1, 1)" in planner.launches[0]
    assert_equals_definition(planner, with_strays(ids, num_experts), num_experts)
    assert_equals_definition(planner, ids, num_experts, capacity=share)
    assert_equals_definition(planner, with_strays(ids, num_experts), num_experts, capacity=share, group_size=100)
    assert_equals_definition(planner, ids, num_experts, capacity=share, priority=torch.rand(num_tokens))
    assert len(planner.launches) == 1


@pytest.mark.parametrize("seed", range(4))
def test_small_shapes_of_every_kind(planner: SimtLibrary, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(25):
        num_tokens, top_k = (int(torch.randint(low, 30, ())) for low in (0, 1))
        num_experts = int(torch.randint(1, 12, ()))
        ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), dtype=torch.int32)
        priority = torch.randint(0, 4, (num_tokens,)).float() if torch.rand(()) < 0.5 else None
        group_size = int(torch.randint(1, 32, ()))
        capacity = int(torch.randint(0, 8, ()))
        assert_equals_definition(planner, ids, num_experts, seed=seed)
        assert_equals_definition(
            planner, ids, num_experts, capacity=capacity, group_size=group_size, priority=priority, seed=seed
        )


# ---- tiles: more than 4096 slots ----


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(4097, 8, 1), (700, 64, 8), (2111, 1030, 3)])
def test_large_batches(planner: SimtLibrary, num_tokens: int, num_experts: int, top_k: int, routing: str) -> None:
    ids = with_strays(ROUTINGS[routing](num_tokens, num_experts, top_k), num_experts)
    share = max(1, num_tokens * top_k // num_experts)
    assert_equals_definition(planner, ids, num_experts)
    assert len(planner.launches) == 2
    assert_equals_definition(planner, ids, num_experts, capacity=share, seed=2)
    assert len(planner.launches) == 4
    assert_equals_definition(planner, ids, num_experts, capacity=3, group_size=333, seed=3)
    assert_equals_definition(planner, ids, num_experts, capacity=share, priority=torch.rand(num_tokens), seed=4)
    assert len(planner.launches) == 4


def test_large_batches_with_groups_and_priority(planner: SimtLibrary) -> None:
    ids = ROUTINGS["zipf"](2100, 16, 2)
    for group_size in (1, 2, 500):
        priority = torch.randint(0, 50, (2100,)).float()
        assert_equals_definition(planner, ids, 16, capacity=1, group_size=group_size, priority=priority)
    assert len(planner.launches) == 6


def test_tiles_of_several_chunks(planner: SimtLibrary) -> None:
    """With so many experts, the tiles' counts leave memory for two tiles only."""
    num_experts = 90_000
    ids = torch.randint(0, num_experts, (4200, 1), dtype=torch.int32)
    ids[::3] = num_experts - 1
    ids[1::3] = 1023 + torch.arange(1400, dtype=torch.int32).unsqueeze(1) % 3
    assert_equals_definition(planner, ids, num_experts)
    assert "<<<(2, 1, 1)" in planner.launches[1]


# ---- the rest of the contract ----


def test_no_tokens(planner: SimtLibrary) -> None:
    for capacity in (None, 1):
        plan = run_plan(planner, torch.zeros(0, 2, dtype=torch.int32), 5, capacity=capacity)
        assert plan.expert_offsets.tolist() == [0] * 6


def test_first_choices_claim_before_second_choices(planner: SimtLibrary) -> None:
    ids = torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.int32)
    plan = run_plan(planner, ids, 2, capacity=2)
    # Expert 0: the first choices of tokens 1 and 2 leave no place for token 0's second choice.
    assert plan.row_of_slot.tolist() == [[2, -1], [0, 3], [1, -1]]
    assert plan.expert_offsets.tolist() == [0, 2, 4]
    assert plan.token_of_row.tolist() == [1, 2, 0, 1, -1, -1]


def test_a_capacity_that_drops_nobody_costs_nothing(planner: SimtLibrary) -> None:
    ids = ROUTINGS["one-expert"](700, 8, 8)
    assert_equals_definition(planner, ids, 8, capacity=700 * 8)
    assert len(planner.launches) == 2


@pytest.mark.parametrize("num_tokens", [5, 5000])
@pytest.mark.parametrize("group_size", [None, 3])
def test_a_token_order_that_is_no_permutation_corrupts_nothing(
    planner: SimtLibrary, num_tokens: int, group_size: int | None
) -> None:
    ids = torch.zeros(num_tokens, 1, dtype=torch.int32)
    for order in (
        torch.tensor([7000, -2, 100000, 1, 1], dtype=torch.int32).repeat(num_tokens // 5),
        torch.full((num_tokens,), -1, dtype=torch.int32),
        torch.full((num_tokens,), num_tokens - 1, dtype=torch.int32),
    ):
        plan = run_plan(planner, ids, 2, capacity=1, group_size=group_size, token_order=order)
        assert 0 <= plan.expert_offsets[-1] <= num_tokens
        assert ((plan.token_of_row >= -1) & (plan.token_of_row < num_tokens)).all()
        assert ((plan.row_of_slot >= -1) & (plan.row_of_slot < num_tokens)).all()


def test_the_workspace_is_as_small_as_it_can_be(planner: SimtLibrary) -> None:
    def workspace(num_tokens: int, top_k: int, num_experts: int, capacity: int = -1, group_size: int = 0) -> int:
        return planner.workspace_bytes(
            "plan",
            num_tokens=num_tokens,
            capacity=capacity,
            group_size=group_size,
            num_experts=num_experts,
            top_k=top_k,
        )

    assert workspace(0, 8, 64) == workspace(512, 8, 64) == workspace(512, 8, 64, capacity=512 * 8) == 0
    assert workspace(512, 8, 64, capacity=5) == 2 * 512 * 8 * 4
    assert workspace(16384, 8, 64) == 64 * 64 * 4
    # Bounded however many slots and experts there are.
    assert workspace(2**28, 4, 128) <= 256 * 128 * 4
    assert workspace(2**20, 8, 100_000) <= 2**20


def test_more_slots_than_a_row_number_can_count_are_an_error(planner: SimtLibrary) -> None:
    ids = poisoned((1, 1), torch.int32)
    with pytest.raises(SimtError, match="cudaError_t 1"):
        planner.run(
            "plan",
            expert_ids=ids,
            expert_offsets=ids,
            token_of_row=ids,
            row_of_slot=ids,
            num_tokens=2**30,
            capacity=-1,
            group_size=1,
            num_experts=4,
            top_k=2,
        )
