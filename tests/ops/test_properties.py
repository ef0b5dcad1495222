"""Plans, permutations and weighted sums of anything hypothesis can think of, against their definitions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from moekernels import ops
from moekernels.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 64, 257, 2048)

# A busy machine is no failure.
settings.register_profile("moekernels", deadline=None)
settings.load_profile("moekernels")


@st.composite
def plan_arguments(draw: st.DrawFn) -> tuple[torch.Tensor, int, dict]:
    num_experts = draw(st.sampled_from([1, 2, 3, 8, 65, 512]))
    num_tokens = draw(st.integers(0, 40))
    top_k = draw(st.integers(1, 6))
    ids = draw(
        st.lists(st.integers(-1, num_experts), min_size=num_tokens * top_k, max_size=num_tokens * top_k)
        | st.integers(0, num_experts - 1).map(lambda e: [e] * (num_tokens * top_k))
    )
    options: dict = {}
    if draw(st.booleans()):
        options["capacity"] = draw(st.integers(1, 8))
        if draw(st.booleans()):
            options["group_size"] = draw(st.integers(1, 50))
        if draw(st.booleans()):
            priority = draw(st.lists(st.integers(0, 5), min_size=num_tokens, max_size=num_tokens))
            options["priority"] = torch.tensor(priority, dtype=torch.float32)
    return torch.tensor(ids, dtype=torch.int32).view(num_tokens, top_k), num_experts, options


@given(plan_arguments())
def test_plan_equals_definition(arguments: tuple[torch.Tensor, int, dict]) -> None:
    expert_ids, num_experts, options = arguments
    actual = ops.plan(expert_ids, num_experts, **options)
    expected = reference.plan(expert_ids, num_experts, **options)
    for name, a, e in zip(ops.Plan._fields, actual, expected, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, e), name


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, ops.Plan]:
    """Hidden states of one of the dtypes with a plan for them, some choices dropped or not routed."""
    num_experts = draw(st.sampled_from([1, 4, 33]))
    num_tokens, top_k, width = draw(st.integers(0, 20)), draw(st.integers(1, 4)), draw(st.sampled_from(WIDTHS))
    count = num_tokens * top_k
    ids = torch.tensor(
        draw(st.lists(st.integers(-1, num_experts - 1), min_size=count, max_size=count)), dtype=torch.int32
    ).view(num_tokens, top_k)
    plan = ops.plan(ids, num_experts, capacity=draw(st.none() | st.integers(1, 4)))
    return torch.randn(num_tokens, width).to(draw(st.sampled_from(DTYPES))), plan


@given(routed())
def test_permute_equals_definition(inputs: tuple[torch.Tensor, ops.Plan]) -> None:
    hidden, plan = inputs
    assert torch.equal(ops.permute(hidden, plan.token_of_row), reference.permute(hidden, plan.token_of_row))


@given(routed(), st.booleans())
def test_unpermute_equals_definition(inputs: tuple[torch.Tensor, ops.Plan], weighted: bool) -> None:
    hidden, plan = inputs
    rows = torch.randn(plan.token_of_row.shape[0], hidden.shape[1]).to(hidden.dtype)
    weights = torch.rand(plan.row_of_slot.shape) if weighted else None
    actual = ops.unpermute(rows, plan.row_of_slot, weights)
    expected = reference.unpermute(rows.double(), plan.row_of_slot, weights)
    torch.testing.assert_close(
        actual, expected.to(rows.dtype), rtol=1e-2 if rows.dtype != torch.float32 else 1e-5, atol=1e-5
    )
