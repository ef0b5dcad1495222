"""What every benchmark shares: the roofs of this machine, the rows, and the table they make.

The roofs stand above the table and are measured in the same run; benchmarks/timing.py says how anything is timed.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

import moekernels
from benchmarks.timing import interleaved_medians, make_clock

# The column of a bound rather than a baseline: as many FLOPs in dense products of equal size.
BOUND = "batched matmul"


@dataclass
class Roofs:
    """What this machine can do at most, measured in the run: the ceilings a kernel is compared with."""

    read_bandwidth: float  # bytes/s, reading a buffer far larger than any cache
    copy_bandwidth: float  # bytes/s, read and written, copying such a buffer
    matmul: dict[str, float]  # dtype -> FLOP/s of a large square matmul

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The least time for that much work."""
        bandwidth = max(self.read_bandwidth, self.copy_bandwidth)
        return max(flops / self.matmul[name_of(dtype)] if flops else 0.0, num_bytes / bandwidth)


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
    clock: str = ""

    @property
    def speedup(self) -> float | None:
        """Against the fastest baseline that does the same work."""
        seconds = [value for name, value in self.baselines.items() if name != BOUND]
        return min(seconds) / self.seconds if seconds else None


def measure_roofs(device: torch.device, dtypes: Sequence[torch.dtype]) -> Roofs:
    """Bandwidth by summing and by copying 1 GiB, and a square matmul of random values in each dtype."""
    buffer = torch.ones(1 << 28, device=device)
    target = torch.empty_like(buffer)
    seconds = interleaved_medians({"read": buffer.sum, "copy": lambda: target.copy_(buffer)}, device, budget=1.5)
    num_bytes = buffer.numel() * buffer.element_size()
    size = 2048 if device.type == "cpu" else 8192
    matmul = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        median = interleaved_medians({"matmul": lambda a=a, b=b: a @ b}, device, budget=1.0)["matmul"]
        matmul[name_of(dtype)] = 2 * size**3 / median
    return Roofs(num_bytes / seconds["read"], 2 * num_bytes / seconds["copy"], matmul)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: torch.device) -> dict[str, object]:
    """What has to stand beside a figure."""
    info = moekernels.build_info()
    about: dict[str, object] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "clock": make_clock(device).name,
        "threads": torch.get_num_threads(),
        "cpu_isa": info["cpu_isa"],
        "moekernels": info["version"],
        "revision": _output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")
        or info["git_revision"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        about["cuda_archs"] = " ".join(info["cuda_archs"])
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
        about["nvidia-smi"] = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return about


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _output_of(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def render(rows: Sequence[Row], roofs: Roofs, about: dict[str, object]) -> str:
    """A Markdown table with fixed columns."""
    baselines = list(dict.fromkeys(name for row in rows for name in row.baselines))
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        f"roofs: read {roofs.read_bandwidth / 1e9:.1f} GB/s, copy {roofs.copy_bandwidth / 1e9:.1f} GB/s; matmul "
        + ", ".join(f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in roofs.matmul.items()),
        "",
        "| shape | tokens | routing | dtype | µs | TFLOP/s | GB/s | % of roof | × best baseline | clock | "
        + "".join(f"{name} µs | " for name in baselines).rstrip(),
        "| --- " * (10 + len(baselines)) + "|",
    ]
    for row in rows:
        cells = [row.shape, str(row.tokens), row.routing, row.dtype, _microseconds(row.seconds)]
        cells += [
            f"{row.flops / row.seconds / 1e12:.3g}" if row.flops else "–",
            f"{row.bytes / row.seconds / 1e9:.1f}",
            f"{row.roof:.0%}",
            f"{row.speedup:.2f}" if row.speedup else "–",
            row.clock,
        ]
        cells += [_microseconds(row.baselines[name]) if name in row.baselines else "–" for name in baselines]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(path: Path, rows: Sequence[Row], roofs: Roofs, about: dict[str, object], command: str) -> None:
    """The rows as JSON, and the table as Markdown beside it."""
    record = {"command": command, "machine": about, "roofs": asdict(roofs), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"`{command}`\n\n{render(rows, roofs, about)}\n")
