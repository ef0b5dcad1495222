"""The option that says where to run, and the clock there."""

from __future__ import annotations

import argparse
import time

import torch


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 or 1, ...; auto takes a GPU if there is one (default: auto)"
    )


def now(device: torch.device) -> float:
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
