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
        "revision": _revision() or info["git_revision"],
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


def _revision() -> str:
    """That of the checkout this file belongs to; nothing where the package is installed."""
    here = Path(__file__)
    tracked = _output_of("git", "-C", str(here.parent), "ls-files", here.name)
    return tracked and _output_of("git", "-C", str(here.parent), "rev-parse", "--short=12", "HEAD")


def _output_of(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
