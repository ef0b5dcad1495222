"""PhiMoE's router against that of transformers 4.56.2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moekernels.nn import SparsemixerRouter, SparseMLP, TopKRouter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A probability in half precision may sit where two roundings meet; in float32 sums are of another order.
ULP = {torch.float32: 4e-7, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}


def scores(kind: str, num_experts: int, dtype: torch.dtype) -> Tensor:
    if kind == "spread":
        return torch.randn(2000, num_experts).to(dtype)
    size = {"near": 1.0, "small": 1e-3, "negative": -1.0}[kind]
    return (torch.randn(2000, 1).abs() * size * (1 + 0.01 * torch.randn(2000, num_experts))).to(dtype)


def identity_router(num_experts: int, dtype: torch.dtype, eps: float) -> SparsemixerRouter:
    """One whose logits are its input."""
    router = SparsemixerRouter(num_experts, num_experts, 2, scoring="sparsemixer", eps=eps).to(dtype)
    torch.nn.init.eye_(router.weight)
    return router


def assert_same_weights(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=ULP[expected.dtype], atol=0)
    if expected.dtype != torch.float32:
        assert (actual != expected.float()).float().mean() < 5e-3


@pytest.mark.parametrize("eps", [0.01, 0.1])
@pytest.mark.parametrize("kind", ["spread", "near", "small", "negative"])
@pytest.mark.parametrize("num_experts", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(dtype: torch.dtype, num_experts: int, kind: str, eps: float) -> None:
    x = scores(kind, num_experts, dtype)
    expected_weights, expected_ids = sparsemixer(x, eps, training=False)
    with torch.no_grad():
        logits, weights, expert_ids = identity_router(num_experts, dtype, eps).eval()(x)
    assert torch.equal(logits, x) and torch.equal(expert_ids.long(), expected_ids)
    assert_same_weights(weights, expected_weights)


@pytest.mark.parametrize("eps", [0.01, 0.1])
@pytest.mark.parametrize("kind", ["spread", "near", "small", "negative"])
@pytest.mark.parametrize("num_experts", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_seed_trains_alike(dtype: torch.dtype, num_experts: int, kind: str, eps: float) -> None:
    x = scores(kind, num_experts, dtype)
    direction = torch.randn(2000, 2)
    router = identity_router(num_experts, dtype, eps)
    torch.manual_seed(3)
    theirs = x.clone().requires_grad_()
    expected_weights, expected_ids = sparsemixer(theirs, eps, training=True)
    (expected_weights.float() * direction).sum().backward()
    expected_next = torch.rand(())

    torch.manual_seed(3)
    ours = x.clone().requires_grad_()
    _, weights, expert_ids = router.train()(ours)
    (weights * direction).sum().backward()
    assert torch.rand(()) == expected_next, "as many random numbers must be drawn"
    assert torch.equal(expert_ids.long(), expected_ids)
    assert_same_weights(weights, expected_weights)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=ULP[dtype], atol=4 * ULP[dtype])
    if kind == "near" and num_experts == 16:
        plain = router.eval()(x).expert_ids
        assert (plain != expert_ids).float().mean() > 0.3, "nothing was drawn"


def test_the_factor_has_no_gradient() -> None:
    """A draw that counts a third moves the logits as much as one that counts in full."""
    router = identity_router(4, torch.float32, eps=0.5).train()
    x = torch.full((4000, 4), 1.0).index_fill_(1, torch.tensor([3]), 1.1).requires_grad_()
    _, weights, expert_ids = router(x)
    weights[:, 0].sum().backward()
    drawn = expert_ids[:, 0] == 0
    partial = weights[:, 0] < 0.1
    assert 0.6 < partial[drawn].float().mean() < 0.9
    gradients = x.grad[drawn]
    torch.testing.assert_close(gradients, gradients[:1].expand_as(gradients))
    torch.testing.assert_close(gradients.abs().sum(-1), 2 * gradients[:, 0])


@pytest.mark.parametrize("training", [False, True])
def test_masked_tokens_are_not_routed(training: bool) -> None:
    router = identity_router(8, torch.float32, eps=0.1).train(training)
    mask = torch.tensor([True, False, True])
    _, weights, expert_ids = router(torch.randn(3, 8), mask)
    assert (expert_ids[1] == -1).all() and (weights[1] == 0).all()
    assert (expert_ids[mask] >= 0).all() and (weights[mask] > 0).all()


def test_no_tokens_in_training() -> None:
    _, weights, expert_ids = identity_router(8, torch.float32, eps=0.1).train()(torch.empty(0, 8))
    assert weights.shape == expert_ids.shape == (0, 2)


def test_nan_stays_in_its_row() -> None:
    router = identity_router(8, torch.float32, eps=0.1).train()
    x = torch.randn(4, 8)
    x[1, 3] = float("nan")
    _, weights, expert_ids = router(x)
    assert weights[1].isnan().any() and weights[[0, 2, 3]].isfinite().all()
    assert ((expert_ids >= 0) & (expert_ids < 8)).all()


def test_the_layer_takes_it_for_that_rule() -> None:
    layer = SparseMLP(16, 8, 4, 2, scoring="sparsemixer", eps=0.3)
    assert isinstance(layer.router, SparsemixerRouter) and layer.router.eps == 0.3
    assert type(SparseMLP(16, 8, 4, 2).router) is TopKRouter
    hidden = torch.randn(50, 16)
    with torch.no_grad():
        torch.nn.init.normal_(layer.router.weight, std=0.3)
        drawn = {tuple(layer(hidden)[0].flatten().tolist()) for _ in range(3)}
        layer.eval()
        fixed = {tuple(layer(hidden)[0].flatten().tolist()) for _ in range(3)}
    assert (len(drawn), len(fixed)) == (3, 1)
