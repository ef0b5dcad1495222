"""Values and arguments nobody should pass, and what must not happen then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moekernels import ops
from moekernels.ops import reference
from tests.gpu.layer import SHAPE, TOKENS, Layer

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("scoring", ["softmax", "top2_gate", "sparsemixer"])
def test_logits_that_are_not_finite_still_give_experts(cuda: torch.device, scoring: str, bad: float) -> None:
    """Every token gets experts that exist; tokens with finite logits get what they would get alone."""
    logits = torch.randn(33, 16, device=cuda)
    logits[3] = bad
    logits[5, 7] = bad
    logits[8, ::2] = bad
    weights, expert_ids = ops.route(logits, 2, scoring=scoring)
    assert ((expert_ids >= 0) & (expert_ids < 16)).all()
    if scoring != "sparsemixer":  # which may choose the same twice where all that is left is -inf
        assert (expert_ids[:, 0] != expert_ids[:, 1]).all()
    clean = logits.isfinite().all(-1)
    alone, alone_ids = reference.route(logits[clean].cpu(), 2, scoring=scoring)
    assert torch.equal(expert_ids[clean].cpu(), alone_ids)
    torch.testing.assert_close(weights[clean].cpu(), alone)


@pytest.mark.parametrize("num_tokens", TOKENS[1:])
def test_a_token_of_nan_keeps_it_to_itself(cuda: torch.device, num_tokens: int) -> None:
    layer = Layer.random(SHAPE, num_tokens, torch.bfloat16, cuda)
    expected = layer.forward()
    layer.x.hidden[5] = NAN
    out = layer.forward()
    others = torch.arange(num_tokens, device=cuda) != 5
    assert out[5].isnan().all()
    assert torch.equal(out[others], expected[others])


def test_expert_ids_outside_the_range_are_not_routed(cuda: torch.device) -> None:
    ids = torch.tensor([[0, 99], [-7, 1], [2**31 - 1, -(2**31)]], dtype=torch.int32, device=cuda)
    plan = ops.plan(ids, 4)
    expected = reference.plan(ids.cpu(), 4)
    for actual, truth in zip(plan, expected, strict=True):
        assert torch.equal(actual.cpu(), truth)


def test_offsets_that_do_not_fit_stay_inside(cuda: torch.device) -> None:
    """On the device offsets cannot be checked without waiting for it: the result is arbitrary, the memory is safe."""
    rows, weight = torch.randn(40, 64, device=cuda), torch.randn(2, 48, 64, device=cuda)
    for dtype in (torch.bfloat16, torch.float32):
        for offsets in ([-5, 10, 2**31 - 1], [100, 7, -3], [2**31 - 1, -(2**31), 2**31 - 1]):
            ops.grouped_gemm(rows.to(dtype), weight.to(dtype), torch.tensor(offsets, dtype=torch.int32, device=cuda))
    torch.cuda.synchronize()


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    hidden = torch.randn(6, 32, device=device)
    ids = torch.zeros(6, 2, dtype=torch.int32, device=device)
    weight = torch.randn(4, 8, 32, device=device)
    offsets = torch.tensor([0, 1, 2, 3, 6], dtype=torch.int32, device=device)
    return {
        "route: top_k": lambda: ops.route(hidden, 33),
        "route: rank": lambda: ops.route(hidden[0], 1),
        "plan: dtype": lambda: ops.plan(ids.float(), 4),
        "permute: dtype": lambda: ops.permute(hidden, ids[:, 0].long()),
        "permute: device": lambda: ops.permute(hidden, ids[:, 0].cpu()),
        "grouped_gemm: in_features": lambda: ops.grouped_gemm(hidden[:, :31], weight, offsets),
        "grouped_gemm: dtype": lambda: ops.grouped_gemm(hidden.half(), weight, offsets),
        "grouped_gemm: device": lambda: ops.grouped_gemm(hidden, weight.cpu(), offsets),
        "grouped_gemm: odd gate": lambda: ops.grouped_gemm(hidden, weight[:, :7], offsets, gated=True),
        "activation: odd gate": lambda: ops.activation(hidden[:, :31], "silu", gated=True),
        "router_stats: groups": lambda: ops.router_stats(hidden, 2, num_groups=4),
        "unpermute: rank": lambda: ops.unpermute(hidden, ids[0]),
    }


@pytest.mark.parametrize("name", list(calls(torch.device("cpu"))))
def test_bad_arguments_raise_before_anything_is_launched(cuda: torch.device, name: str) -> None:
    """Nothing is allocated on the way to the error: an output would be, before any launch."""
    bad = calls(cuda)[name]
    with pytest.raises((ValueError, TypeError)) as outside:
        bad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with pytest.raises((ValueError, TypeError)) as again:
        bad()
    assert str(again.value) == str(outside.value)
    copies = 1 if "dtype" in name or "device" in name else 0  # the test's own conversions
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= copies
