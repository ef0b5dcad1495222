from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moekernels.models.losses import (
    causal_lm_loss,
    load_balancing_loss,
    load_balancing_loss_by_row,
    router_z_loss,
    seq2seq_lm_loss,
    switch_router_losses,
)


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(top_k: int, masked: bool) -> None:
    logits = [torch.randn(12, 8, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]) if masked else None
    ours = load_balancing_loss(logits, top_k, mask)
    theirs = load_balancing_loss_func(tuple(logits), 8, top_k, mask)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(mine, other)


def test_perfect_balance_gives_top_k() -> None:
    shifted = torch.stack([torch.eye(4)[i % 4] * 1e-4 for i in range(8)])
    torch.testing.assert_close(load_balancing_loss([shifted], 1), torch.tensor(1.0))
    torch.testing.assert_close(load_balancing_loss([torch.zeros(8, 4)], 4), torch.tensor(4.0))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, one token at a time."""
    losses = [
        -F.log_softmax(logits[b, s].double(), dim=-1)[labels[b, s + 1]]
        for b in range(labels.shape[0])
        for s in range(labels.shape[1] - 1)
        if labels[b, s + 1] != -100
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_causal_lm_loss(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 7, 13, dtype=dtype), torch.randint(0, 13, (2, 7))
    labels[0, 3] = labels[1, 5] = -100
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), next_token_loss(logits, labels), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(causal_lm_loss(logits, labels, num_items_in_batch=4), loss * 10 / 4)


def test_wrong_labels() -> None:
    with pytest.raises(ValueError, match=r"\[2, 7\], got \[2, 6\]"):
        causal_lm_loss(torch.randn(2, 7, 13), torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        causal_lm_loss(torch.randn(2, 7, 13), None)


def test_seq2seq_loss() -> None:
    logits = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(11, (2, 5))
    labels[0, 2:] = -100
    expected = F.cross_entropy(logits.view(-1, 11), labels.view(-1))
    torch.testing.assert_close(seq2seq_lm_loss(logits, labels), expected)
    half = logits.bfloat16()
    assert seq2seq_lm_loss(half, labels).dtype == torch.float32
    torch.testing.assert_close(
        seq2seq_lm_loss(half, labels), F.cross_entropy(half.float().view(-1, 11), labels.view(-1))
    )


def test_seq2seq_labels_are_checked() -> None:
    logits = torch.randn(1, 2, 11)
    for label in (11, -1, -99):
        with pytest.raises(ValueError, match=f"labels must be from 0 to 10, or -100 where .*, got {label}"):
            seq2seq_lm_loss(logits, torch.tensor([[0, label]]))
    with pytest.raises(ValueError, match=r"labels must have the shape .* \[1, 2\], got \[2\]"):
        seq2seq_lm_loss(logits, torch.tensor([0, 1]))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_losses_of_switch_routers(num_layers: int) -> None:
    logits = [torch.randn(2, 7, 5, requires_grad=True) for _ in range(num_layers)]
    joined = torch.cat(logits, dim=1)
    pairs = (
        (load_balancing_loss_by_row(logits), switch.load_balancing_loss_func(joined.softmax(-1), joined.argmax(-1))),
        (router_z_loss(logits), switch.router_z_loss_func(joined)),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
            torch.testing.assert_close(mine, other)
    z_loss, balance = switch_router_losses(logits)
    assert torch.equal(balance, pairs[0][0]) and torch.allclose(z_loss, pairs[1][0])
    balanced = (torch.eye(4) * 1e-4).repeat(2, 1)[None]
    torch.testing.assert_close(load_balancing_loss_by_row([balanced]), torch.tensor(1.0))


def test_slopes_of_router_losses() -> None:
    """Finite differences along a random direction, padding included; the choices stay what they are."""
    logits, direction = torch.randn(2, 9, 6) * 2, torch.randn(2, 9, 6)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

    def loss(logits: Tensor) -> Tensor:
        z_loss, balance = switch_router_losses([logits, logits.flip(0)])
        return z_loss + balance + load_balancing_loss([logits.flatten(0, 1)], 2, mask)

    (grad,) = torch.autograd.grad(loss(logits.requires_grad_()), logits)
    step = 2e-4
    with torch.no_grad():
        slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=5e-3, atol=5e-3)


def test_tokens_in_the_cache_are_not_counted() -> None:
    logits = [torch.randn(6, 4) for _ in range(2)]
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    expected = load_balancing_loss(logits, 2, mask[:, 2:])
    assert torch.equal(load_balancing_loss(logits, 2, mask), expected)
    additive = torch.zeros(2, 1, 3, 5)
    assert torch.equal(load_balancing_loss(logits, 2, additive), load_balancing_loss(logits, 2))
