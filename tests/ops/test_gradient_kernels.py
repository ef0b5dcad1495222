"""The ops that backward passes are made of, against their definitions, and these against the forward definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from moekernels.ops.activation import ACTIVATION_FUNCTIONS
from tests.generators import ROUTINGS
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 16, 37, 264)
kernels = torch.ops.moekernels


def offsets_of(*counts: int, device: torch.device) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def plain_activation_grad(
    grad_out: Tensor, linear: Tensor, activation: str, gated: bool, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own backward pass, in the dtype of the inputs."""
    linear = linear.detach().requires_grad_()
    with torch.enable_grad():
        act = ACTIVATION_FUNCTIONS[activation]
        out = act(linear.chunk(2, -1)[0]) * linear.chunk(2, -1)[1] if gated else act(linear)
    (grad_linear,) = torch.autograd.grad(out, linear, grad_out * scale.unsqueeze(-1).to(grad_out.dtype))
    out = out.detach()
    return grad_linear, out * scale.unsqueeze(-1).to(out.dtype), (grad_out * out).sum(-1).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activation_and_its_gradient(unit: torch.device, activation: str, gated: bool, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        linear = (torch.randn(9, width * (2 if gated else 1), device=unit) * 3).to(dtype)
        grad_out, scale = torch.randn(9, width, device=unit).to(dtype), torch.rand(9, device=unit)
        out = ops.activation(linear, activation, gated=gated)
        actual = kernels.activation_grad(grad_out, linear, activation, gated, scale)
        x, act = linear.double(), ACTIVATION_FUNCTIONS[activation]
        by_hand = act(linear.chunk(2, -1)[0]) * linear.chunk(2, -1)[1] if gated else act(linear)
        assert_accurate(out, reference.activation(x, activation, gated=gated), by_hand)
        truth = reference.activation_grad(grad_out.double(), x, activation, gated=gated, row_scale=scale.double())
        size_of_terms = (grad_out.double() * out.double()).abs().sum(-1).max().item()
        plain = plain_activation_grad(grad_out, linear, activation, gated, scale)
        for a, t, p, floor in zip(actual, truth, plain, (None, None, size_of_terms), strict=True):
            assert_accurate(a, t, p, floor)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_slopes_far_out(device: torch.device, activation: str) -> None:
    x = torch.tensor([-90.0, -20.0, -9.5, -1.0, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.5, 1.0, 9.5, 20.0, 90.0, 1e4])
    x = x.to(device).unsqueeze(1)
    actual = kernels.activation_grad(torch.ones_like(x), x, activation, False)[0]
    expected = reference.activation_grad(torch.ones_like(x).double(), x.double(), activation)[0]
    # Terms of order one cancel where a slope is small.
    torch.testing.assert_close(actual, expected.float(), rtol=3e-6, atol=1e-6)


def test_activation_grad_past_the_last_row(device: torch.device) -> None:
    """NaN there has no influence, and all three results are zero."""
    linear, grad_out = torch.randn(7, 10, device=device), torch.randn(7, 5, device=device)
    scale = torch.rand(7, device=device)
    for x in (linear, grad_out, scale):
        x[5:] = float("nan")
    offsets = offsets_of(2, 0, 3, device=device)
    actual = kernels.activation_grad(grad_out, linear, "silu", True, scale, offsets)
    used = kernels.activation_grad(grad_out[:5], linear[:5], "silu", True, scale[:5])
    for a, u in zip(actual, used, strict=True):
        assert torch.equal(a[:5], u) and (a[5:] == 0).all()


def test_results_that_are_not_asked_for(device: torch.device) -> None:
    linear, grad_out = torch.randn(2, 4, 6, device=device)
    full = kernels.activation_grad(grad_out, linear, "gelu", False)
    grad_linear, scaled, grad_scale = kernels.activation_grad(grad_out, linear, "gelu", False, None, None, False, False)
    assert torch.equal(grad_linear, full[0]) and scaled.shape == (0, 6) and grad_scale.shape == (0,)
    slots, tokens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0, 1], [2, -1]], [0, 0, 1]))
    rows, grad = torch.randn(3, 5, device=device), torch.randn(2, 5, device=device)
    full = kernels.unpermute_grad(grad, rows, slots, tokens)
    grad_rows, grad_weights = kernels.unpermute_grad(grad, None, slots, tokens)
    assert torch.equal(grad_rows, full[0]) and grad_weights.shape == (0, 2)
    grad_rows, grad_weights = kernels.unpermute_grad(grad, rows, slots, tokens, None, False)
    assert grad_rows.shape == (0, 5) and torch.equal(grad_weights, full[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_grad(unit: torch.device, weighted: bool, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        plan = ops.plan(ROUTINGS["zipf"](11, 6, 3, unit), 6, capacity=4)
        rows, grad_out = (torch.randn(count, width, device=unit).to(dtype) for count in (33, 11))
        rows[plan.expert_offsets[-1] :] = float("nan")
        weights = torch.randn(11, 3, device=unit) if weighted else None
        actual = kernels.unpermute_grad(grad_out, rows, plan.row_of_slot, plan.token_of_row, weights)
        truth = reference.unpermute_grad(grad_out.double(), rows.double(), plan.row_of_slot, weights)
        size_of_terms = grad_out.double().norm(dim=1).max().item() * rows.nan_to_num().double().norm(dim=1).max().item()
        rounded = truth[0].to(dtype), truth[1].float()
        for a, t, p, scale in zip(actual, truth, rounded, (None, size_of_terms), strict=True):
            assert_accurate(a, t, p, scale)


def test_gradients_that_are_not_contiguous(device: torch.device) -> None:
    plan = ops.plan(ROUTINGS["uniform"](6, 4, 2, device), 4)
    rows, weights = torch.randn(12, 8, device=device), torch.rand(6, 2, device=device)
    wide = torch.randn(6, 20, device=device)
    for grad_out in (wide[:, 3:11], wide[:, ::2][:, :8], wide[:1, :8].expand(6, 8), wide[0, 0].expand(6, 8)):
        actual = kernels.unpermute_grad(grad_out, rows, plan.row_of_slot, plan.token_of_row, weights)
        expected = kernels.unpermute_grad(grad_out.contiguous(), rows, plan.row_of_slot, plan.token_of_row, weights)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for grad_out in (wide[:, 3:11], wide[0, 0].expand(6, 8)):
        actual = kernels.activation_grad(grad_out, rows[:6], "silu", False)
        expected = kernels.activation_grad(grad_out.contiguous(), rows[:6], "silu", False)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


RULES = [
    dict(),
    dict(renormalize=True),
    dict(probs_dtype=torch.bfloat16, renormalize=True),
    dict(scoring="top2_gate"),
    dict(scoring="top2_gate", renormalize=True),
    dict(scoring="top2_gate", probs_dtype=torch.float16, renormalize=True),
    dict(scoring="sparsemixer"),
    dict(scoring="sparsemixer", eps=0.3, renormalize=True),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(str(value) for value in rule.values()) or "softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (8, 2), (37, 5), (64, 8)])
def test_route_grad(device: torch.device, num_experts: int, top_k: int, dtype: torch.dtype, rule: dict) -> None:
    if rule.get("scoring", "softmax") != "softmax":
        top_k = 2
    logits = (torch.randn(13, num_experts, device=device) * 2).to(dtype)
    grad_weights, mask = torch.randn(13, top_k, device=device), torch.rand(13, device=device) < 0.8
    _, expert_ids = ops.route(logits, top_k, mask=mask, **rule)
    order = ("scoring", "renormalize", "probs_dtype", "eps")
    defaults = dict(scoring="softmax", renormalize=False, probs_dtype=None, eps=0.01)
    options = {**defaults, **rule}
    actual = kernels.route_grad(grad_weights, logits, expert_ids, *(options[name] for name in order))
    truth = reference.route_grad(grad_weights.double(), logits.double(), expert_ids, **rule)
    plain = reference.route_grad(grad_weights, logits, expert_ids, **rule)
    assert (actual[~mask] == 0).all()
    assert_accurate(actual, truth, plain, grad_weights.abs().max().item())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(str(value) for value in rule.values()) or "softmax")
def test_the_definition_of_route_grad_is_the_gradient_of_the_definition(rule: dict) -> None:
    for logits in (torch.randn(7, 6).double() * 2, torch.randn(7, 6).double() * 0.02 + 1):
        logits.requires_grad_()
        weights, expert_ids = reference.route(logits, 2, **rule)
        direction = torch.randn_like(weights)
        (expected,) = torch.autograd.grad(weights, logits, direction)
        actual = reference.route_grad(direction, logits.detach(), expert_ids, **rule)
        # Automatic differentiation rounds gradients where probabilities were rounded.
        rounding = torch.finfo(rule["probs_dtype"]).eps if "probs_dtype" in rule else 1e-12
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("scoring", ["top2_gate", "sparsemixer"])
def test_route_grad_of_a_choice_that_noise_made(device: torch.device, scoring: str) -> None:
    """The weights are those of the experts that were picked, whichever these are."""
    logits = 1 + torch.randn(40, 8, device=device) * 0.1
    noise = torch.randn(*((2,) if scoring == "sparsemixer" else ()), 40, 8, device=device)
    options = dict(scoring=scoring, eps=0.1, renormalize=True)
    weights, expert_ids = ops.route(logits.requires_grad_(), 2, noise=noise, **options)
    assert not torch.equal(expert_ids, ops.route(logits, 2, **options)[1])
    direction = torch.randn(40, 2, device=device)
    (actual,) = torch.autograd.grad(weights, logits, direction)
    leaf = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.route(leaf, 2, noise=noise, **options)[0], leaf, direction.double())
    (plain,) = torch.autograd.grad(reference.route(logits, 2, noise=noise, **options)[0], logits, direction)
    assert_accurate(actual, truth, plain)


def test_route_grad_where_nothing_is_chosen(device: torch.device) -> None:
    """NaN logits of a token that is not routed stay where they are, and so do those of one that is."""
    logits = torch.randn(4, 5, device=device)
    logits[1:3] = float("nan")
    ids = torch.tensor([[0, 1], [-1, -1], [0, 1], [-1, 3]], dtype=torch.int32, device=device)
    grad = kernels.route_grad(torch.ones(4, 2, device=device), logits, ids)
    assert (grad[1] == 0).all() and grad[2].isnan().all() and grad[[0, 3]].isfinite().all()
    alone = reference.route_grad(torch.ones(1, 1, device=device), logits[3:], ids[3:, 1:])
    torch.testing.assert_close(grad[3:], alone)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("activation", (torch.zeros(3), "silu", False), r"linear must have 2 dimensions"),
        ("activation", (torch.zeros(3, 5), "silu", True), "must be even, got 5"),
        ("activation", (torch.zeros(3, 4), "swish", True), "activation must be one of none, relu"),
        ("activation", (torch.zeros(3, 4).double(), "silu", True), "linear must be float32, bfloat16 or float16"),
        (
            "activation_grad",
            (torch.zeros(3, 4), torch.zeros(3, 4), "silu", True),
            r"grad_out must have shape \[num_rows, width\] = \[3, 2\], got \[3, 4\]",
        ),
        ("activation_grad", (torch.zeros(3, 4).half(), torch.zeros(3, 4), "silu", False), "float32 like linear"),
        (
            "activation_grad",
            (torch.zeros(3, 4), torch.zeros(3, 4), "silu", False, torch.zeros(2)),
            r"row_scale must have shape \[num_rows\] = \[3\], got \[2\]",
        ),
        (
            "activation_grad",
            (torch.zeros(3, 4), torch.zeros(3, 4), "silu", False, None, torch.tensor([0, 4]).int()),
            "no more than the number of rows, 3, got 4",
        ),
        (
            "unpermute_grad",
            (torch.zeros(2, 4), None, torch.zeros(3, 1).int(), torch.zeros(3).int()),
            r"row_of_slot must have shape \[num_tokens, top_k\] = \[2, 1\], got \[3, 1\]",
        ),
        (
            "unpermute_grad",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 1).int(), torch.zeros(3).int()),
            r"rows must have shape \[num_rows, hidden_size\] = \[3, 4\], got \[2, 4\]",
        ),
        (
            "route_grad",
            (torch.zeros(2, 1), torch.zeros(2, 4), torch.zeros(2, 2).int()),
            r"grad_weights must have shape \[num_tokens, top_k\] = \[2, 2\], got \[2, 1\]",
        ),
        (
            "route_grad",
            (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3).int(), "top2_gate"),
            "chooses 2 experts, got top_k 3",
        ),
        (
            "route_grad",
            (torch.zeros(0, 2), torch.zeros(0, 2**31), torch.zeros(0, 2).int()),
            r"logits must have fewer than 2\^31 experts, got 2147483648",
        ),
        (
            "router_stats_grad",
            (torch.zeros(1, 4), torch.zeros(2), torch.zeros(6, 4)),
            r"grad_z_sums must have shape \[num_groups\] = \[1\], got \[2\]",
        ),
        (
            "router_stats_grad",
            (torch.zeros(4, 4), torch.zeros(4), torch.zeros(6, 4)),
            "num_groups must divide the number of tokens, 6, got 4",
        ),
        ("permute", (torch.zeros(2, 3), torch.zeros(4).int(), torch.zeros(3, 2).int()), "one row per token, 2, got 3"),
    ],
)
def test_bad_input(op: str, arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"moekernels::{op}: .*{message}"):
        getattr(kernels, op)(*arguments)
