from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = [
    dict(scoring="softmax"),
    dict(scoring="softmax", renormalize=True),
    dict(scoring="softmax", probs_dtype=torch.bfloat16),
    dict(scoring="softmax", probs_dtype=torch.float16, renormalize=True),
    dict(scoring="top2_gate"),
    dict(scoring="top2_gate", probs_dtype=torch.bfloat16),
    dict(scoring="top2_gate", renormalize=True),
    dict(scoring="sparsemixer"),
    dict(scoring="sparsemixer", eps=0.2),
]
SHAPES = [
    (0, 4, 2),
    (1, 2, 2),
    (7, 8, 2),
    (33, 64, 8),
    (5, 512, 32),
    (3, 1000, 17),
    (2, 1024, 64),
    (4, 2, 1),
    (3, 1, 1),
]


def _name(value: object) -> str | None:
    return "-".join(str(v).removeprefix("torch.") for v in value.values()) if isinstance(value, dict) else None


def assert_same_routing(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(actual[0], expected[0].float(), rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("rule", RULES, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_equals_definition(
    device: torch.device, num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, rule: dict
) -> None:
    if rule["scoring"] != "softmax":
        if num_experts < 2:
            pytest.skip("the rule chooses two experts")
        top_k = 2
    logits = (torch.randn(num_tokens, num_experts, device=device) * 2).to(dtype)
    # A probability that sits on a rounding boundary may fall either way, since exp itself may differ by a bit.
    rtol = (
        1e-2
        if rule.get("probs_dtype") is not None or (rule["scoring"] == "sparsemixer" and dtype != torch.float32)
        else 2e-6
    )
    assert_same_routing(ops.route(logits, top_k, **rule), reference.route(logits, top_k, **rule), rtol)


@pytest.mark.parametrize("scoring", ops.SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(device: torch.device, scoring: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 64, dtype=dtype, device=device)
    logits[1, 40:] = 1.0
    logits[2, ::7] = -2.0
    top_k = 8 if scoring == "softmax" else 2
    weights, expert_ids = ops.route(logits, top_k, scoring=scoring)
    assert expert_ids[0].tolist() == list(range(top_k))
    assert expert_ids[1].tolist() == list(range(40, 40 + top_k))
    assert expert_ids[2].tolist() == [1, 2, 3, 4, 5, 6, 8, 9][:top_k]
    assert_same_routing((weights, expert_ids), reference.route(logits, top_k, scoring=scoring))


@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_values_that_are_not_finite(device: torch.device, rule: dict) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [0.0, nan, 1.0, nan, -1.0],
            [nan] * 5,
            [0.0, inf, 1.0, 2.0, inf],
            [-inf] * 5,
            [-inf, 0.0, -inf, 3.0, -inf],
            [-inf, -inf, -inf, 3.0, -inf],
            [3.4e38, -3.4e38, 3.4e38, 0.0, 1.0],
            [1.0, 2.0, 3.0, 4.0, 5.0],
        ],
        device=device,
    )
    weights, expert_ids = ops.route(logits, 2, **rule)
    assert ((expert_ids >= 0) & (expert_ids < 5)).all()
    assert weights[-1].isfinite().all(), "a token must not see the NaN of another"
    assert_same_routing((weights, expert_ids), reference.route(logits, 2, **rule), rtol=1e-2)


@pytest.mark.parametrize("scoring", ops.SCORINGS)
def test_masked_tokens_are_not_routed(device: torch.device, scoring: str) -> None:
    logits = torch.randn(6, 8, device=device)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    weights, expert_ids = ops.route(logits, 2, scoring=scoring, mask=mask)
    assert (expert_ids[~mask] == -1).all() and (weights[~mask] == 0).all()
    unmasked = ops.route(logits, 2, scoring=scoring)
    assert torch.equal(expert_ids[mask], unmasked[1][mask]) and torch.equal(weights[mask], unmasked[0][mask])


def test_noise_moves_only_the_second_choice(device: torch.device) -> None:
    logits = torch.randn(50, 16, device=device)
    noise = torch.randn(50, 16, device=device) * 5
    actual = ops.route(logits, 2, scoring="top2_gate", noise=noise)
    assert_same_routing(actual, reference.route(logits, 2, scoring="top2_gate", noise=noise))
    plain = ops.route(logits, 2, scoring="top2_gate")
    assert torch.equal(actual[1][:, 0], plain[1][:, 0])
    assert not torch.equal(actual[1][:, 1], plain[1][:, 1])


@pytest.mark.parametrize("eps", [0.01, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_draws_among_near_ties(device: torch.device, dtype: torch.dtype, eps: float) -> None:
    logits = (1 + torch.randn(300, 16, device=device) * 0.1).to(dtype)
    logits[0], logits[1] = float("-inf"), float("nan")
    noise = -torch.empty(2, 300, 16, device=device).exponential_().log()
    noise[:, 2, 3] = float("inf")
    options = dict(scoring="sparsemixer", eps=eps)
    weights, expert_ids = ops.route(logits, 2, noise=noise, **options)
    rtol = 2e-6 if dtype == torch.float32 else 1e-2
    assert_same_routing((weights, expert_ids), reference.route(logits, 2, noise=noise, **options), rtol)
    plain_weights, plain_ids = ops.route(logits, 2, **options)
    assert 0.2 < (expert_ids != plain_ids).any(dim=-1).float().mean() < 1
    # Without the noise nothing else changes: what was drawn as before has the weight it had before.
    same = expert_ids[:, 0] == plain_ids[:, 0]
    torch.testing.assert_close(weights[same, 0], plain_weights[same, 0], rtol=0, atol=0, equal_nan=True)


def test_no_noise_is_noise_of_zero(device: torch.device) -> None:
    logits = torch.randn(40, 8, device=device)
    quiet = ops.route(logits, 2, scoring="sparsemixer", noise=torch.zeros(2, 40, 8, device=device))
    for actual, expected in zip(quiet, ops.route(logits, 2, scoring="sparsemixer"), strict=True):
        assert torch.equal(actual, expected)


def test_gradient_of_drawn_weights(device: torch.device) -> None:
    """Of the softmax over the near-ties that were left in each pass, whatever was drawn."""
    logits = (1 + torch.randn(30, 8, device=device) * 0.1).requires_grad_()
    noise = -torch.empty(2, 30, 8, device=device).exponential_().log()
    direction = torch.randn(30, 2, device=device)
    weights, expert_ids = ops.route(logits, 2, scoring="sparsemixer", eps=0.05, noise=noise)
    (actual,) = torch.autograd.grad((weights * direction).sum(), logits)
    expected = torch.zeros(30, 8, dtype=torch.float64)
    scores, gone = logits.detach().double().cpu(), torch.zeros(30, 8, dtype=torch.bool)
    for k in range(2):
        left = scores.masked_fill(gone, float("-inf"))
        top = left.amax(-1, keepdim=True)
        far = (top - scores) / scores.abs().maximum(top) > 0.1
        chosen = expert_ids[:, k : k + 1].long().cpu()
        probs = left.masked_fill(far, float("-inf")).softmax(-1)
        weight = probs.gather(-1, chosen)
        upstream = direction[:, k : k + 1].double().cpu()
        expected += upstream * weight * (torch.zeros(30, 8).scatter(-1, chosen, 1.0) - probs)
        gone = gone.scatter(-1, chosen, True)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_sparsemixer_with_negative_scores(device: torch.device) -> None:
    """The near-tie window is relative to each score's own size where the maximum is negative."""
    weights, expert_ids = ops.route(torch.tensor([[-1.0, -2.0, -1.01, -3.0]], device=device), 2, scoring="sparsemixer")
    assert expert_ids.tolist() == [[0, 2]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.5025, 1.0]]), rtol=0, atol=1e-4)


def test_logits_that_are_not_contiguous(device: torch.device) -> None:
    base = torch.randn(40, 96, device=device)
    for logits in (base[:, :64], base[::2], base.T, base[:, ::3]):
        assert_same_routing(ops.route(logits, 4), reference.route(logits, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=torch.zeros(4)), r"logits must have 2 dimensions \[num_tokens, num_experts\], got 1"),
        (
            dict(logits=torch.zeros(4, 8, dtype=torch.complex64)),
            "logits must be float32, bfloat16 or float16, got ComplexFloat",
        ),
        (dict(top_k=9), "top_k must be between 1 and the number of experts, 8, got 9"),
        (dict(top_k=0), "top_k must be between 1 and the number of experts, 8, got 0"),
        (dict(logits=torch.zeros(4, 0)), "at least 1 expert, got 0"),
        (dict(scoring="softmin"), "scoring must be one of softmax, top2_gate, sparsemixer; got 'softmin'"),
        (dict(scoring="top2_gate", top_k=3), "chooses 2 experts, got top_k 3"),
        (dict(scoring="sparsemixer", probs_dtype=torch.float16), "probs_dtype does not apply to scoring 'sparsemixer'"),
        (dict(probs_dtype=torch.int32), "probs_dtype must be float32, bfloat16 or float16, got int32"),
        (dict(noise=torch.zeros(4, 8)), "noise does not apply to scoring 'softmax'"),
        (
            dict(scoring="sparsemixer", noise=torch.zeros(4, 8)),
            r"noise must have .*\[2, num_tokens, num_experts\]",
        ),
        (
            dict(scoring="top2_gate", top_k=2, noise=torch.zeros(4, 7)),
            r"noise must have shape .* = \[4, 8\], got \[4, 7\]",
        ),
        (dict(mask=torch.zeros(3, dtype=torch.bool)), r"mask must have shape \[num_tokens\] = \[4\], got \[3\]"),
        (dict(mask=torch.zeros(4)), "mask must be bool, got float32"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::route: .*{message}"):
        ops.route(**{"logits": torch.zeros(4, 8), "top_k": 2, **arguments})


def test_float64_probabilities_of_float32_logits_are_those_in_float32() -> None:
    """A model in float64 whose router computes in float32 passes the dtype of its tokens."""
    logits = torch.randn(9, 6)
    for scoring, top_k in (("softmax", 1), ("top2_gate", 2)):
        finer = ops.route(logits, top_k, scoring=scoring, probs_dtype=torch.float64)
        for one, other in zip(finer, ops.route(logits, top_k, scoring=scoring, probs_dtype=torch.float32), strict=True):
            assert torch.equal(one, other)
