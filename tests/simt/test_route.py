"""``csrc/cuda/routing/route.cu`` on the CPU, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.ops import reference
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned
from tests.simt.params import Scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = {"softmax": Scoring.SOFTMAX, "top2_gate": Scoring.TOP2_GATE, "sparsemixer": Scoring.SPARSEMIXER}
RULES: list[dict[str, Any]] = [
    dict(scoring="softmax"),
    dict(scoring="softmax", renormalize=True),
    dict(scoring="softmax", probs_dtype=torch.bfloat16),
    dict(scoring="softmax", probs_dtype=torch.float16, renormalize=True),
    dict(scoring="top2_gate"),
    dict(scoring="top2_gate", probs_dtype=torch.bfloat16),
    dict(scoring="top2_gate", probs_dtype=torch.float16, renormalize=True),
    dict(scoring="sparsemixer"),
    dict(scoring="sparsemixer", eps=0.2, renormalize=True),
]
# Both sides of every size that changes the kernel (16, 64, 128, 256, 512, 1024 experts), and sizes no vector divides.
EXPERTS = (2, 8, 16, 17, 37, 64, 65, 128, 131, 256, 300, 512, 521, 1024, 1030)


@pytest.fixture(scope="module")
def router(simt: Simt) -> SimtLibrary:
    return simt.library("routing/route.cu")


def _name(value: object) -> str | None:
    return "-".join(str(v).removeprefix("torch.") for v in value.values()) if isinstance(value, dict) else None


def run_route(
    router: SimtLibrary,
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype = torch.float32,
    eps: float = 0.01,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    weights = poisoned((num_tokens, top_k), torch.float32)
    expert_ids = torch.full((num_tokens, top_k), -7, dtype=torch.int32)
    router.run(
        "route",
        settings=settings,
        logits=logits,
        noise=noise,
        mask=mask,
        weights=weights,
        expert_ids=expert_ids,
        num_tokens=num_tokens,
        logits_stride=logits.stride(0),
        num_experts=num_experts,
        top_k=top_k,
        scoring=SCORINGS[scoring],
        logits_dtype=logits.dtype,
        probs_dtype=probs_dtype,
        renormalize=renormalize,
        eps=eps,
    )
    return weights, expert_ids


def assert_same_routing(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float = 2e-6) -> None:
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0].float(), rtol=rtol, atol=1e-7, equal_nan=True)


def tolerance(dtype: torch.dtype, rule: dict[str, Any]) -> float:
    """Where results are rounded, exp may differ by a bit and its rounding fall the other way."""
    rounded = "probs_dtype" in rule or (rule["scoring"] == "sparsemixer" and dtype != torch.float32)
    return 1e-2 if rounded else 2e-6


@pytest.mark.parametrize("rule", RULES, ids=_name)
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_equals_definition(router: SimtLibrary, num_experts: int, rule: dict[str, Any]) -> None:
    for seed, dtype in enumerate(DTYPES):
        torch.manual_seed(100 * seed + num_experts)
        num_tokens = (5, 1, 17)[seed]
        top_k = min((1, 8, 5)[seed], num_experts) if rule["scoring"] == "softmax" else 2
        logits = (torch.randn(num_tokens, num_experts) * 2).to(dtype)
        actual = run_route(router, logits, top_k, **rule, settings=Settings(seed=seed))
        assert_same_routing(actual, reference.route(logits, top_k, **rule), tolerance(dtype, rule))
        assert len(router.launches) == 1


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (13, 13), (16, 9), (64, 32), (64, 33), (100, 100), (600, 40), (1025, 70)]
)
def test_float64_agrees_for_any_top_k(router: SimtLibrary, num_experts: int, top_k: int, renormalize: bool) -> None:
    logits = torch.randn(6, num_experts) * 3
    expected = reference.route(logits.double(), top_k, renormalize=renormalize)
    for seed in (0, 1):
        actual = run_route(router, logits, top_k, renormalize=renormalize, settings=Settings(seed=seed))
        assert_same_routing(actual, expected)


@pytest.mark.parametrize("num_experts", [16, 64, 1030])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_ties_go_to_the_lowest_index(router: SimtLibrary, scoring: str, num_experts: int) -> None:
    for dtype in DTYPES:
        logits = torch.zeros(4, num_experts, dtype=dtype)
        logits[0, 1::2] = -0.0
        logits[1, num_experts // 2 :] = 1.0
        logits[2, ::7] = -2.0
        top_k = 8 if scoring == "softmax" else 2
        actual = run_route(router, logits, top_k, scoring=scoring)
        assert actual[1][0].tolist() == list(range(top_k))
        assert actual[1][1].tolist() == list(range(num_experts // 2, num_experts // 2 + top_k))
        assert_same_routing(
            actual, reference.route(logits, top_k, scoring=scoring), tolerance(dtype, {"scoring": scoring})
        )


@pytest.mark.parametrize("num_experts", [5, 50, 1025])
@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_values_that_are_not_finite(router: SimtLibrary, rule: dict[str, Any], num_experts: int) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [0.0, nan, 1.0, nan, -1.0],
        [nan] * 5,
        [0.0, inf, 1.0, 2.0, inf],
        [-inf] * 5,
        [-inf, 0.0, -inf, 3.0, -inf],
        [-inf, -inf, -inf, 3.0, -inf],
        [3.4e38, -3.4e38, 3.4e38, 0.0, 1.0],
        [1.0, 2.0, 3.0, 4.0, 5.0],
    ]
    logits = torch.tensor(rows).repeat_interleave(num_experts // 5, dim=1)
    logits[1, ::2] = torch.tensor(-4096, dtype=torch.int32).view(torch.float32)  # another NaN, with its sign bit set
    weights, expert_ids = run_route(router, logits, 2, **rule)
    assert ((expert_ids >= 0) & (expert_ids < num_experts)).all()
    assert weights[-1].isfinite().all(), "a token must not see the NaN of another"
    assert_same_routing((weights, expert_ids), reference.route(logits, 2, **rule), rtol=1e-2)


@pytest.mark.parametrize("num_experts", [8, 40, 1100])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_masked_tokens_are_not_routed(router: SimtLibrary, scoring: str, num_experts: int) -> None:
    logits = torch.randn(6, num_experts)
    mask = torch.tensor([True, False, True, True, False, True])
    for seed in range(3):
        actual = run_route(router, logits, 2, scoring=scoring, mask=mask, settings=Settings(seed=seed))
        assert_same_routing(actual, reference.route(logits, 2, scoring=scoring, mask=mask))


@pytest.mark.parametrize("num_experts", [8, 128, 1100])
def test_noise_moves_only_the_second_choice(router: SimtLibrary, num_experts: int) -> None:
    logits = torch.randn(20, num_experts)
    noise = torch.randn(20, num_experts) * 5
    actual = run_route(router, logits, 2, scoring="top2_gate", noise=noise)
    assert_same_routing(actual, reference.route(logits, 2, scoring="top2_gate", noise=noise))
    plain = run_route(router, logits, 2, scoring="top2_gate")
    assert torch.equal(actual[1][:, 0], plain[1][:, 0])
    assert not torch.equal(actual[1][:, 1], plain[1][:, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [8, 17, 128, 300, 1100])
def test_noise_draws_among_the_near_ties(router: SimtLibrary, num_experts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_experts)
    logits = (torch.randn(24, num_experts) * 0.2 + 2).to(dtype)
    logits[::4] = 1.0  # where the noise alone decides, and its rounded sums tie
    noise = -torch.empty(2, 24, num_experts).exponential_().log()
    plain = run_route(router, logits, 2, scoring="sparsemixer", eps=0.04)
    for seed in range(2):
        settings = Settings(seed=seed)
        actual = run_route(router, logits, 2, scoring="sparsemixer", eps=0.04, noise=noise, settings=settings)
        expected = reference.route(logits, 2, scoring="sparsemixer", eps=0.04, noise=noise)
        assert_same_routing(actual, expected, tolerance(dtype, {"scoring": "sparsemixer"}))
    for k in range(2):
        assert not torch.equal(actual[1][:, k], plain[1][:, k])
    silent = run_route(router, logits, 2, scoring="sparsemixer", eps=0.04, noise=torch.zeros_like(noise))
    assert torch.equal(silent[1], plain[1]) and torch.equal(silent[0], plain[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [7, 8, 64, 66, 101, 1026])
def test_rows_at_any_stride_and_alignment(router: SimtLibrary, num_experts: int, dtype: torch.dtype) -> None:
    for stride in (num_experts + 5, (num_experts + 11) // 8 * 8):
        base = torch.randn(9, stride).to(dtype)
        for logits in (base[:, :num_experts], base[:, 1 : num_experts + 1], base[::2, 4 : num_experts + 4]):
            assert_same_routing(run_route(router, logits, 4), reference.route(logits, 4))


def test_a_token_is_routed_alike_in_every_batch(router: SimtLibrary) -> None:
    logits = torch.randn(11, 64)
    weights, expert_ids = run_route(router, logits, 8, renormalize=True)
    for token in range(11):
        alone = run_route(router, logits[token : token + 1], 8, renormalize=True)
        assert torch.equal(alone[0][0], weights[token]) and torch.equal(alone[1][0], expert_ids[token])


def test_nothing_to_route(router: SimtLibrary) -> None:
    run_route(router, torch.zeros(0, 8), 2)
    assert router.launches == []


@pytest.mark.parametrize(("top_k", "scoring"), [(9, "softmax"), (1, "top2_gate"), (3, "sparsemixer")])
def test_choices_that_cannot_be_made_are_an_error(router: SimtLibrary, top_k: int, scoring: str) -> None:
    with pytest.raises(SimtError, match="cudaError_t 1"):
        run_route(router, torch.zeros(2, 8), top_k, scoring=scoring)
