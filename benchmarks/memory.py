"""What a capacity-limited layer allocates, beside what masks of tokens by experts by places would take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

import moekernels
from moekernels._memory import trim_heap
from moekernels.models import NllbMoeConfig
from moekernels.models.nllb_moe import NllbMoeSparseMLP

# Width, experts and choices of nllb-moe-54b; narrow experts, as only buffers that grow with the tokens matter here.
_HIDDEN, _EXPERTS, _TOP_K, _FFN = 2048, 128, 2, 256
_TOKENS = (256, 1024, 4096, 16384)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that is in use during a call, above what was before.

    On a CPU this is the process's resident memory, whose high-water mark Linux lets a process set back. What the ops
    and the C library keep from earlier calls is not counted before: it is released.
    """
    gc.collect()
    moekernels.release_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def layer_memory(device: torch.device) -> str:
    """A Markdown table over growing numbers of tokens."""
    config = NllbMoeConfig(d_model=_HIDDEN, num_experts=_EXPERTS, moe_eval_capacity_token_fraction=1.0)
    layer = NllbMoeSparseMLP(config, _FFN).to(device).eval()
    for weight in layer.parameters():
        weight.normal_(std=0.02)
    lines = [
        f"NLLB-MoE layer, {_EXPERTS} experts, top {_TOP_K}, {_HIDDEN} wide, experts {_FFN} wide, float32, evaluation "
        "capacity = all tokens",
        "",
        "| tokens T | measured MiB | KiB per T·K | a bool mask [T, E, capacity] MiB | buffers [E, capacity, H] MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    layer(torch.randn(1, 8, _HIDDEN, device=device))
    for num_tokens in _TOKENS:
        hidden = torch.randn(1, num_tokens, _HIDDEN, device=device)
        used = peak_bytes(lambda hidden=hidden: layer(hidden), device)
        places = _EXPERTS * num_tokens
        lines.append(
            f"| {num_tokens} | {used / 2**20:.1f} | {used / (num_tokens * _TOP_K) / 1024:.1f} | "
            f"{num_tokens * places / 2**20:,.0f} | {places * _HIDDEN * 4 / 2**20:,.0f} |"
        )
    return "\n".join(lines)
