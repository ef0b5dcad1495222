"""Memory that nobody has written to yet, made of NaN: what is read before it is written shows."""

from __future__ import annotations

import torch


def poison_free_memory() -> None:
    """What is allocated next, up to a few megabytes in pieces of any size, holds NaN."""
    taken = [torch.full((2**power,), float("nan")) for power in range(4, 20) for _ in range(2)]
    del taken
