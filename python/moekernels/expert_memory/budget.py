"""How much memory experts may take."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from moekernels._memory import free_memory
from moekernels.checkpoint import parse_size

ExpertMemory: TypeAlias = int | str
"""Bytes; a string such as "8GiB"; or "auto", what the machine has free, less a margin."""

#: What "auto" leaves to activations, key/value caches and everybody else: an eighth of what is free, but at least this.
_MARGIN = 2**30


def parse_expert_memory(value: ExpertMemory) -> int | Literal["auto"]:
    """The bytes, or "auto".

    Raises:
        ValueError: it is no size.
    """
    if value == "auto":
        return "auto"
    try:
        if isinstance(value, bool):
            raise ValueError
        return parse_size(value)
    except ValueError:
        raise ValueError(
            f'expert_memory must be a positive number of bytes, a string such as "8GiB", or "auto", got {value!r}'
        ) from None


def auto_budget(device: torch.device) -> int:
    """Bytes that "auto" takes, of what is free now on a device."""
    free = free_memory(device)
    return max(min(free - free // 8, free - _MARGIN), 0)
