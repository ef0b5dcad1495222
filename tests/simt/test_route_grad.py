"""``csrc/cuda/routing/route_grad.cu`` on the CPU, against autograd of the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.ops import reference
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned
from tests.simt.test_route import DTYPES, EXPERTS, RULES, SCORINGS, _name


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library("routing/route_grad.cu")


def run(
    library: SimtLibrary,
    grad_weights: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype = torch.float32,
    eps: float = 0.01,
    out: Tensor | None = None,
    seed: int = 1,
) -> Tensor:
    num_tokens, num_experts = logits.shape
    out = poisoned((num_tokens, num_experts), logits.dtype) if out is None else out
    library.run(
        "route_grad",
        settings=Settings(seed=seed),
        logits=logits,
        expert_ids=expert_ids,
        grad_weights=grad_weights,
        grad_logits=out,
        num_tokens=num_tokens,
        logits_stride=logits.stride(0),
        num_experts=num_experts,
        top_k=expert_ids.shape[1],
        scoring=SCORINGS[scoring],
        logits_dtype=logits.dtype,
        probs_dtype=probs_dtype,
        renormalize=renormalize,
        eps=eps,
    )
    return out


def definition(
    grad_weights: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype = torch.float32,
    eps: float = 0.01,
) -> Tensor:
    """In float64; rounding has the gradient 1, and slots of -1 have no weight."""
    leaf = logits.double().requires_grad_()
    chosen = expert_ids >= 0
    ids = expert_ids.long().clamp(min=0)
    if scoring == "sparsemixer":
        probs_dtype, candidates, columns = logits.dtype, logits, []
        for k in range(2):
            kept = reference.near_ties(logits, candidates, eps) > float("-inf")  # in the dtype of the logits
            columns.append(torch.softmax(leaf.masked_fill(~kept, float("-inf")), -1).gather(-1, ids[:, k, None]))
            removed = candidates.scatter(-1, ids[:, k, None], float("-inf"))
            candidates = torch.where(chosen[:, k, None], removed, candidates)
        weights = torch.cat(columns, dim=-1)
    else:
        weights = torch.softmax(leaf, dim=-1).gather(-1, ids)
    weights = torch.where(chosen, weights, 0.0)
    if renormalize:
        weights = weights + (weights.to(probs_dtype).double() - weights).detach()
        smallest = torch.finfo(probs_dtype).eps if scoring == "top2_gate" else 0.0
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=smallest)
    (grad,) = torch.autograd.grad((weights * torch.where(chosen, grad_weights, 0.0)).sum(), leaf)
    return torch.where(chosen.any(-1, keepdim=True), grad, 0.0)


def assert_grad(actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
    eps = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol or eps, atol=max(rtol or 0.0, 3e-6))


def tolerance(rule: dict[str, Any]) -> float | None:
    """A probability that is rounded the other way moves the renormalized gradient by a rounding."""
    if not rule.get("renormalize"):
        return None
    return 2e-2 if rule["scoring"] == "sparsemixer" or "probs_dtype" in rule else None


@pytest.mark.parametrize("rule", RULES, ids=_name)
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_equals_definition(library: SimtLibrary, num_experts: int, rule: dict[str, Any]) -> None:
    for seed, dtype in enumerate(DTYPES):
        torch.manual_seed(100 * seed + num_experts)
        num_tokens = (5, 1, 17)[seed]
        top_k = min((1, 8, 5)[seed], num_experts) if rule["scoring"] == "softmax" else 2
        logits = (torch.randn(num_tokens, num_experts) * 2).to(dtype)
        _, expert_ids = reference.route(logits, top_k, **rule)
        grad_weights = torch.randn(num_tokens, top_k)
        actual = run(library, grad_weights, logits, expert_ids, **rule, seed=seed)
        assert_grad(actual, definition(grad_weights, logits, expert_ids, **rule), tolerance(rule))
        assert len(library.launches) == 1


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (13, 13), (16, 9), (64, 33), (100, 100), (1025, 70)])
def test_any_top_k(library: SimtLibrary, num_experts: int, top_k: int, renormalize: bool) -> None:
    logits, grad_weights = torch.randn(6, num_experts) * 3, torch.randn(6, top_k)
    _, expert_ids = reference.route(logits, top_k)
    actual = run(library, grad_weights, logits, expert_ids, renormalize=renormalize)
    assert_grad(actual, definition(grad_weights, logits, expert_ids, renormalize=renormalize))


@pytest.mark.parametrize("num_experts", [16, 40, 1100])
@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_choices_that_were_not_made(library: SimtLibrary, rule: dict[str, Any], num_experts: int) -> None:
    """What lies in their grad_weights, or in the logits of a token without any, has no influence."""
    logits, grad_weights = torch.randn(4, num_experts) * 0.02 + 1, torch.randn(4, 2)
    _, expert_ids = reference.route(logits, 2, **rule)
    expert_ids[0] = expert_ids[1, 1] = expert_ids[2, 0] = -1
    expected = definition(grad_weights, logits, expert_ids, **rule)
    logits[0], grad_weights[expert_ids < 0] = float("nan"), float("nan")
    actual = run(library, grad_weights, logits, expert_ids, **rule)
    assert_grad(actual, expected, tolerance(rule))
    assert not actual[0].any() and actual[1:].any(dim=-1).any()


def test_near_ties_of_any_choice(library: SimtLibrary) -> None:
    """Noise may pick an expert that is not the largest, and the second window opens around what is left."""
    for dtype in DTYPES:
        logits = torch.tensor([[1.0, 0.97, 0.96, 0.5, -1.0], [-1.0, -1.03, -1.01, -1.02, -2.0], [0.0] * 5]).to(dtype)
        for ids in ([[1, 0], [2, 3], [4, 0]], [[2, 1], [1, 0], [0, 1]], [[0, 2], [3, 3], [1, 1]]):
            expert_ids, grad_weights = torch.tensor(ids, dtype=torch.int32), torch.randn(3, 2)
            for renormalize in (False, True):
                if renormalize and any(a == b for a, b in ids):
                    continue
                rule: dict[str, Any] = dict(scoring="sparsemixer", eps=0.03, renormalize=renormalize)
                actual = run(library, grad_weights, logits, expert_ids, **rule)
                assert_grad(actual, definition(grad_weights, logits, expert_ids, **rule), tolerance(rule))


def test_a_sum_below_the_smallest(library: SimtLibrary) -> None:
    """NLLB-MoE divides by at least eps; there the weights do not share a sum."""
    logits = torch.zeros(2, 8)
    logits[0, 0] = 30.0
    expert_ids, grad_weights = torch.tensor([[3, 5], [3, 5]], dtype=torch.int32), torch.tensor([[1.0, -2.0]] * 2) * 1e6
    for probs_dtype in (torch.float32, torch.bfloat16):
        rule: dict[str, Any] = dict(scoring="top2_gate", renormalize=True, probs_dtype=probs_dtype)
        actual = run(library, grad_weights, logits, expert_ids, **rule)
        expected = definition(grad_weights, logits, expert_ids, **rule)
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-4, atol=1e-3)
        assert expected[0].abs().max() > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [7, 8, 64, 66, 101, 1026])
def test_rows_at_any_stride_and_alignment(library: SimtLibrary, num_experts: int, dtype: torch.dtype) -> None:
    grad_weights = torch.randn(9, 4)
    for stride in (num_experts + 5, (num_experts + 11) // 8 * 8):
        base = torch.randn(18, stride).to(dtype)
        for logits in (base[:9, :num_experts], base[:9, 1 : num_experts + 1], base[::2, 4 : num_experts + 4]):
            _, expert_ids = reference.route(logits, 4)
            expected = definition(grad_weights, logits, expert_ids)
            assert_grad(run(library, grad_weights, logits, expert_ids), expected)
            space = poisoned((logits.numel() + 1,), dtype)
            out = space[1:].view(9, num_experts)
            assert_grad(run(library, grad_weights, logits, expert_ids, out=out), expected)


def test_nothing_to_do(library: SimtLibrary) -> None:
    run(library, torch.zeros(0, 2), torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.int32))
    assert library.launches == []
    grad = run(library, torch.zeros(3, 0), torch.zeros(3, 8), torch.zeros(3, 0, dtype=torch.int32))
    assert not grad.any()


@pytest.mark.parametrize("scoring", ["top2_gate", "sparsemixer"])
def test_a_rule_of_two_choices(library: SimtLibrary, scoring: str) -> None:
    with pytest.raises(SimtError, match="cudaError_t 1"):
        run(library, torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.int32), scoring=scoring)
