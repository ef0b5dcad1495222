"""The baseline must compute the same thing, or its timings would mean nothing."""

from __future__ import annotations

import torch

from moekernels.cli import eager
from moekernels.ops import reference


def test_baseline_equals_reference() -> None:
    tokens, hidden, ffn, experts, top_k = 33, 24, 10, 7, 3
    logits = torch.randn(tokens, experts)
    weights, ids = eager.route(logits, top_k)
    expected_weights, expected_ids = reference.route(logits, top_k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)
    plan, expected_plan = eager.plan(ids, experts), reference.plan(ids, experts)
    for mine, their in zip(plan, expected_plan, strict=True):
        assert torch.equal(mine, their) and mine.dtype == their.dtype
    x = torch.randn(tokens, hidden)
    up, down = torch.randn(experts, 2 * ffn, hidden), torch.randn(experts, hidden, ffn)
    expected = reference.sparse_mlp(x, weights, plan, up, down)
    torch.testing.assert_close(eager.sparse_mlp(x, weights, plan, up, down), expected, rtol=1e-4, atol=1e-4)
