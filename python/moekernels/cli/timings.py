"""How long each op takes, beside plain PyTorch in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moekernels import ops
from moekernels.cli import eager
from moekernels.cli.device import now

_SECONDS_EACH = 0.06


def time_pair(ours: Callable[[], Any], baseline: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """The shortest seconds of both, measured in turns: other work on the machine can only add."""
    for _ in range(2):
        ours()
        baseline()
    times: tuple[list[float], list[float]] = ([], [])
    end = now(device) + 2 * _SECONDS_EACH
    while now(device) < end or len(times[0]) < 15:
        for function, measured in zip((ours, baseline), times, strict=True):
            start = now(device)
            function()
            measured.append(now(device) - start)
    return min(times[0]), min(times[1])


@torch.no_grad()
def time_ops(
    num_tokens: int,
    hidden_size: int,
    ffn_size: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[str, ...]]:
    """Rows for a table: op, shape, dtype, µs, rate, times plain PyTorch.

    The rate counts the arithmetic of matrix products, and elsewhere the bytes that must be read and written.
    """
    tokens, hidden, ffn, experts = num_tokens, hidden_size, ffn_size, num_experts
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, logits = normal(tokens, hidden), normal(tokens, experts)
    up, down = normal(experts, 2 * ffn, hidden) * hidden**-0.5, normal(experts, hidden, ffn) * ffn**-0.5
    weights, ids = ops.route(logits, top_k)
    plan = ops.plan(ids, experts)
    rows = ops.permute(x, plan.token_of_row)
    inner = ops.grouped_gemm(rows, up, plan.expert_offsets, activation="silu", gated=True)
    outputs = ops.grouped_gemm(inner, down, plan.expert_offsets)

    n, size = tokens * top_k, x.element_size()
    moved = {
        "route": tokens * experts * size + n * 8,
        "plan": n * 12 + experts * 4,
        "permute": n * (2 * hidden * size + 4),
        "unpermute": n * (hidden * size + 8) + tokens * hidden * size,
    }
    flops = {"grouped_gemm up": 4 * n * hidden * ffn, "grouped_gemm down": 2 * n * hidden * ffn}
    flops["sparse_mlp"] = sum(flops.values())
    offsets, of_row, of_slot = plan.expert_offsets, plan.token_of_row, plan.row_of_slot
    gate: dict[str, Any] = {"activation": "silu", "gated": True}
    cases: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
        "route": (
            f"{tokens}x{experts} top {top_k}",
            lambda: ops.route(logits, top_k),
            lambda: eager.route(logits, top_k),
        ),
        "plan": (f"{tokens}x{top_k} of {experts}", lambda: ops.plan(ids, experts), lambda: eager.plan(ids, experts)),
        "permute": (f"{n}x{hidden}", lambda: ops.permute(x, of_row), lambda: eager.permute(x, of_row)),
        "grouped_gemm up": (
            f"{n}x{hidden}x{2 * ffn}",
            lambda: ops.grouped_gemm(rows, up, offsets, **gate),
            lambda: eager.grouped_gemm(rows, up, offsets, **gate),
        ),
        "grouped_gemm down": (
            f"{n}x{ffn}x{hidden}",
            lambda: ops.grouped_gemm(inner, down, offsets),
            lambda: eager.grouped_gemm(inner, down, offsets),
        ),
        "unpermute": (
            f"{n}x{hidden}",
            lambda: ops.unpermute(outputs, of_slot, weights),
            lambda: eager.unpermute(outputs, of_slot, weights),
        ),
        "sparse_mlp": (
            f"{tokens}x{hidden}x{ffn}",
            lambda: ops.sparse_mlp(x, weights, plan, up, down),
            lambda: eager.sparse_mlp(x, weights, plan, up, down),
        ),
    }
    table: list[tuple[str, ...]] = []
    for name, (shape, ours, baseline) in cases.items():
        seconds, baseline_seconds = time_pair(ours, baseline, device)
        rate = (
            f"{flops[name] / seconds / 1e9:.1f} GFLOP/s" if name in flops else f"{moved[name] / seconds / 1e9:.1f} GB/s"
        )
        speedup = f"{baseline_seconds / seconds:.1f}x"
        table.append((name, shape, str(dtype).removeprefix("torch."), f"{seconds * 1e6:,.1f}", rate, speedup))
    return table
