"""What has to stand beside a figure."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from moekernels import build_info
from moekernels.bench.clocks import make_clock


def machine(device: torch.device) -> dict[str, object]:
    """The date, the device and its clock, and the versions of what runs on it."""
    info = build_info()
    about: dict[str, object] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "clock": make_clock(device).name,
        "threads": torch.get_num_threads(),
        "cpu_isa": info["cpu_isa"],
        "moekernels": info["version"],
        "revision": revision_of(Path(__file__)) or info["git_revision"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        about["cuda_archs"] = " ".join(info["cuda_archs"])
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
        about["nvidia-smi"] = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return about


def described(about: dict[str, object]) -> str:
    """On one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def revision_of(file: Path) -> str:
    """The commit of the checkout a file belongs to, with "+changes" if tracked files differ from it.

    Empty where the file is tracked by none, as in an installed package. Results of earlier runs are no change: they say
    nothing about what runs.
    """
    git = ("git", "-C", str(file.parent))
    if not _output_of(*git, "ls-files", file.name):
        return ""
    sources = (":(top)", ":(top,exclude)benchmarks/results")
    changes = _output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return _output_of(*git, "rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")


def _output_of(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
