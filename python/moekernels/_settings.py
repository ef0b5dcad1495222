"""Switches that hold for the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from moekernels._library import _C

_batch_invariant = False
_cpu_isa: str = _C.build_info()["cpu_isa"]


class _BatchInvariant(contextlib.AbstractContextManager[None]):
    """The previous setting, restored when used as a context manager."""

    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __exit__(self, *exc: object) -> None:
        global _batch_invariant
        _batch_invariant = self._previous


def batch_invariant(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Make a token's output bits independent of the other tokens in its batch (capacity drops aside).

    Takes effect at once; used in a ``with`` statement, it is undone at the end of the block. On a GPU every number of
    rows then takes the same path, which costs speed for few rows. On the CPU the kernels are batch-invariant anyway,
    but for float32 on processors with AMX, which are then slower for many rows.
    """
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, enabled
    return _BatchInvariant(previous)


def is_batch_invariant() -> bool:
    """Whether :func:`batch_invariant` is on."""
    return _batch_invariant


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Use the CPU kernels of one instruction set within the block; ``build_info()["cpu_isas"]`` lists the names.

    Raises:
        ValueError: if this machine or this build does not have it.
    """
    previous = _cpu_isa
    _set_cpu_isa(name)
    try:
        yield
    finally:
        _set_cpu_isa(previous)


def current_cpu_isa() -> str:
    """The instruction set of the CPU kernels in use."""
    return _cpu_isa


def _set_cpu_isa(name: str) -> None:
    global _cpu_isa
    _C.set_cpu_isa(name)
    _cpu_isa = name


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on a device; None where it is off or unknown (the meta device)."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
