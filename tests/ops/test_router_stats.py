"""The sums behind the auxiliary losses, and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INF, NAN = float("inf"), float("nan")


def plain(logits: Tensor, top_k: int, num_groups: int, mask: Tensor | None) -> list[Tensor]:
    """As the model libraries write it."""
    probs = torch.softmax(logits.float(), dim=-1)
    choices = torch.nn.functional.one_hot(logits.topk(top_k).indices, logits.shape[1]).sum(1).float()
    z = torch.logsumexp(logits.float(), dim=-1).square()
    weight = torch.ones_like(logits[:, 0], dtype=torch.float32) if mask is None else mask
    sums = (choices * weight[:, None], probs * weight[:, None], z * weight)
    return [x.unflatten(0, (num_groups, -1)).sum(1) for x in sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_groups", "group_size", "num_experts", "top_k"),
    [(1, 1, 1, 1), (1, 200, 8, 2), (3, 65, 37, 5), (5, 7, 64, 8), (2, 64, 130, 1)],
)
def test_equals_definition(
    unit: torch.device, num_groups: int, group_size: int, num_experts: int, top_k: int, masked: bool, dtype: torch.dtype
) -> None:
    logits = (torch.randn(num_groups * group_size, num_experts, device=unit) * 3).to(dtype)
    mask = torch.randint(0, 3, (logits.shape[0],), device=unit).float() / 2 if masked else None
    directions = torch.randn(num_groups, num_experts, device=unit), torch.randn(num_groups, device=unit)
    actual = ops.router_stats(logits.requires_grad_(), top_k, num_groups=num_groups, mask=mask)
    (grad,) = torch.autograd.grad(actual[1:], logits, directions)
    leaf = logits.detach().double().requires_grad_()
    truth = reference.router_stats(leaf, top_k, num_groups=num_groups, mask=mask)
    (true_grad,) = torch.autograd.grad(truth[1:], leaf, [d.double() for d in directions])
    eager = plain(logits, top_k, num_groups, mask)
    (plain_grad,) = torch.autograd.grad(eager[1:], logits, directions)
    assert torch.equal(actual.counts, truth[0].float())
    for a, t, p in zip(actual[1:], truth[1:], eager[1:], strict=True):
        assert_accurate(a, t.detach(), p)
    assert_accurate(grad, true_grad, plain_grad)


def test_the_definition_of_the_gradient() -> None:
    logits = torch.randn(12, 5).double().requires_grad_()
    mask = torch.tensor([1.0, 0.0, 0.5] * 4).double()

    def sums(logits: Tensor) -> tuple[Tensor, Tensor]:
        return reference.router_stats(logits, 2, num_groups=3, mask=mask)[1:]

    assert torch.autograd.gradcheck(sums, logits)
    directions = torch.randn(3, 5).double(), torch.randn(3).double()
    (expected,) = torch.autograd.grad(sums(logits), logits, directions)
    torch.testing.assert_close(reference.router_stats_grad(*directions, logits.detach(), mask), expected)


def test_by_finite_differences(device: torch.device) -> None:
    """The kernels' own slope: float32 differences of a smooth function of all three sums."""
    logits, direction = torch.randn(2, 10, 6, device=device)

    def loss(logits: Tensor) -> Tensor:
        stats = ops.router_stats(logits, 2, num_groups=2)
        return (stats.counts * stats.prob_sums).sum() + 0.1 * stats.z_sums.sum()

    (grad,) = torch.autograd.grad(loss(logits.requires_grad_()), logits)
    step = 1e-3
    with torch.no_grad():
        slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=2e-3, atol=2e-3)


def test_tokens_that_do_not_count_may_hold_anything(device: torch.device) -> None:
    logits, mask = torch.randn(6, 4, device=device), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=device)
    broken = logits.masked_fill(mask[:, None] == 0, float("nan")).requires_grad_()
    stats = ops.router_stats(broken, 2, mask=mask)
    for actual, expected in zip(stats, ops.router_stats(logits[mask == 1], 2), strict=True):
        torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(stats.prob_sums.square().sum() + stats.z_sums.sum(), broken)
    assert (grad[mask == 0] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize(
    "row", [[INF], [-INF, -INF], [1, INF, 2], [INF, INF, 0], [NAN, INF], [INF, NAN], [-INF, 1, NAN]]
)
def test_values_that_are_not_finite(unit: torch.device, row: list[float]) -> None:
    logits = torch.tensor([row], device=unit)
    actual, expected = ops.router_stats(logits, 1), reference.router_stats(logits, 1)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, msg=name)


def test_no_tokens(device: torch.device) -> None:
    stats = ops.router_stats(torch.empty(0, 4, device=device).requires_grad_(), 2, num_groups=3)
    assert [tuple(x.shape) for x in stats] == [(3, 4), (3, 4), (3,)] and all((x == 0).all() for x in stats)
    stats.prob_sums.sum().backward()


def test_no_sum_depends_on_the_threads() -> None:
    logits = torch.randn(1000, 40)
    direction = torch.randn(2, 40)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            stats = ops.router_stats(leaf, 4, num_groups=2)
            (grad,) = torch.autograd.grad((stats.prob_sums * direction).sum() + stats.z_sums.sum(), leaf)
            results.append((*stats, grad))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_logits_that_are_not_contiguous(device: torch.device) -> None:
    base = torch.randn(12, 20, device=device)
    for logits in (base[:, 2:10], base[::2, :8], base[:, ::2], base.T):
        for actual, expected in zip(ops.router_stats(logits, 2), ops.router_stats(logits.contiguous(), 2), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=torch.zeros(4)), r"logits must have 2 dimensions \[num_tokens, num_experts\], got 1"),
        (dict(logits=torch.zeros(4, 8).int()), "logits must be float32, bfloat16 or float16, got int32"),
        (dict(top_k=9), "top_k must be between 1 and the number of experts, 8, got 9"),
        (dict(num_groups=3), "num_groups must divide the number of tokens, 4, got 3"),
        (dict(num_groups=0), "num_groups must divide the number of tokens, 4, got 0"),
        (dict(mask=torch.zeros(3)), r"mask must have shape \[num_tokens\] = \[4\], got \[3\]"),
        (dict(mask=torch.zeros(4, dtype=torch.bool)), "mask must be float32, got bool"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::router_stats: .*{message}"):
        ops.router_stats(**{"logits": torch.zeros(4, 8), "top_k": 2, **arguments})
