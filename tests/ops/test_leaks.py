"""Calls leave nothing behind on the heap: what a call kept, a server would keep for every token."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moekernels import ops

_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _heap() -> int:
    """Bytes that the C library has handed out and not got back."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    return int(libc.mallinfo2().uordblks)


def _calls() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    hidden, matrix, heads = torch.randn(4, 64), torch.randn(32, 64), torch.randn(1, 4, 3, 16)
    up, down = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    quantized = ops.quantize(matrix, "int4")
    routing = ops.route(torch.randn(4, 4), 2)
    weights = routing.weights
    plan = ops.plan(routing.expert_ids, 4)
    rows = ops.permute(hidden, plan.token_of_row)
    trained = [tensor.clone().requires_grad_() for tensor in (hidden, weights, up, down)]

    def step() -> None:
        x, w, *matrices = trained
        ops.sparse_mlp(x, w, plan, *matrices).sum().backward()

    return {
        "linear": lambda: ops.linear(hidden, matrix),
        "linear of quantised weights": lambda: ops.linear(hidden, quantized),
        "rms_norm": lambda: ops.rms_norm(hidden, hidden[0]),
        "attention": lambda: ops.attention(heads, heads, heads, scale=0.25),
        "route": lambda: ops.route(hidden, 2),
        "plan": lambda: ops.plan(routing.expert_ids, 4),
        "permute": lambda: ops.permute(hidden, plan.token_of_row),
        "grouped_gemm": lambda: ops.grouped_gemm(rows, up, plan.expert_offsets, activation="silu", gated=True),
        "grouped_gemm of a table": lambda: ops.grouped_gemm(rows, list(up.unbind()), plan.expert_offsets),
        "activation": lambda: ops.activation(rows, "silu", gated=True),
        "unpermute": lambda: ops.unpermute(rows, plan.row_of_slot, weights),
        "sparse_mlp": lambda: ops.sparse_mlp(hidden, weights, plan, up, down),
        "a training step": step,
    }


_CALLS, _TIMES = _calls(), 300


def _growth(call: Callable[[], Any]) -> int:
    """In which caches and other threads may have a part, but not every time."""
    before = _heap()
    for _ in range(_TIMES):
        call()
    return _heap() - before


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_before_stays() -> Iterator[None]:
    """Collecting goes through every object of the process otherwise, several times a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not count")
@pytest.mark.parametrize("name", _CALLS)
def test_a_call_leaves_nothing_behind(name: str) -> None:
    call = _CALLS[name]
    for _ in range(20):  # caches fill
        call()
    assert min(_growth(call) for _ in range(3)) < _TIMES * 8  # the smallest block takes 32
