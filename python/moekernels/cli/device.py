"""Where to run."""

from __future__ import annotations

import argparse
import time

import torch

from moekernels import build_info
from moekernels.pipelines.device import numbered_device


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 or 1, ...; auto takes a GPU if there is one (default: auto)"
    )


def resolve_device(name: str) -> torch.device:
    """The device of that name; a number is a GPU, or the CPU where there is none, with a warning, or if it is -1.

    Raises:
        ValueError: there is no such device, or this build has no kernels for it.
    """
    built_for_cuda = bool(build_info()["cuda_archs"])
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and built_for_cuda else "cpu")
    if name.removeprefix("-").isdigit():
        return numbered_device(int(name))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda (cuda:1, ...), got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no CUDA device")
        if not built_for_cuda:
            raise ValueError(f"--device {name}: this build has no CUDA kernels: {build_info()['cuda_reason']}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def now(device: torch.device) -> float:
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
