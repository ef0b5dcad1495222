"""Timing, roofs and tables that every benchmark shares.

All contestants of a row run in the same process, interleaved, so that a change of clock or a busy neighbour meets them
alike; a row reports medians. The roofs stand above the table and are measured in the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

import moekernels


@dataclass
class Roofs:
    """What this machine can do at most, measured in the run: the ceilings a kernel is compared with."""

    read_bandwidth: float  # bytes/s, reading a buffer far larger than any cache
    matmul: dict[str, float]  # dtype -> FLOP/s of a large square matmul


@dataclass
class Row:
    shape: str
    tokens: int
    routing: str
    dtype: str
    seconds: float
    flops: float
    bytes: float
    roof: float  # the fraction of the nearer roof
    baselines: dict[str, float] = field(default_factory=dict)  # name -> seconds

    @property
    def speedup(self) -> float | None:
        """Against the fastest baseline."""
        return min(self.baselines.values()) / self.seconds if self.baselines else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians(
    contestants: dict[str, Callable[[], object]], device: torch.device, budget: float = 2.0, max_rounds: int = 200
) -> dict[str, float]:
    """Median seconds per call of each contestant; `budget` is the time all rounds together may take."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    synchronize(device)
    begin = time.perf_counter()
    for round_number in range(max_rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        if round_number >= 2 and time.perf_counter() - begin > budget:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def measure_roofs(device: torch.device, dtypes: Sequence[torch.dtype]) -> Roofs:
    """Read bandwidth by summing 1 GiB, and a square matmul in each dtype."""
    buffer = torch.ones(1 << 28, device=device)
    read = min(interleaved_medians({"read": buffer.sum}, device, budget=1.0).values())
    size = 2048 if device.type == "cpu" else 8192
    matmul = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(interleaved_medians({"matmul": lambda a=a, b=b: a @ b}, device, budget=1.0).values())
        matmul[name_of(dtype)] = 2 * size**3 / seconds
    return Roofs(buffer.numel() * 4 / read, matmul)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: torch.device) -> dict[str, object]:
    """What has to stand beside a figure."""
    info = moekernels.build_info()
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": info["cpu_isa"],
        "moekernels": info["version"],
        "revision": _revision() or info["git_revision"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def render(rows: Sequence[Row], roofs: Roofs, about: dict[str, object]) -> str:
    """A Markdown table with fixed columns."""
    baselines = list(dict.fromkeys(name for row in rows for name in row.baselines))
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        f"roofs: read {roofs.read_bandwidth / 1e9:.1f} GB/s; matmul "
        + ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in roofs.matmul.items()),
        "",
        "| shape | tokens | routing | dtype | µs | GFLOP/s | GB/s | % of roof | × best baseline | "
        + " | ".join(f"{name} µs" for name in baselines)
        + " |",
        "| --- " * (9 + len(baselines)) + "|",
    ]
    for row in rows:
        others = [f"{row.baselines[name] * 1e6:.0f}" if name in row.baselines else "–" for name in baselines]
        speedup = f"{row.speedup:.2f}" if row.speedup else "–"
        cells = [row.shape, str(row.tokens), row.routing, row.dtype, f"{row.seconds * 1e6:.0f}"]
        cells += [
            f"{row.flops / row.seconds / 1e9:.1f}",
            f"{row.bytes / row.seconds / 1e9:.1f}",
            f"{row.roof:.0%}",
            speedup,
        ]
        lines.append("| " + " | ".join([*cells, *others]) + " |")
    return "\n".join(lines)


def save(path: Path, rows: Sequence[Row], roofs: Roofs, about: dict[str, object], command: str) -> None:
    """The rows as JSON, and the table as Markdown beside it."""
    record = {"command": command, "machine": about, "roofs": asdict(roofs), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"`{command}`\n\n{render(rows, roofs, about)}\n")
