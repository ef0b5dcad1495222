"""Switches that hold for the whole process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from moekernels._library import _C

_batch_invariant = False
_cpu_isa: str = _C.build_info()["cpu_isa"]
_CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

# The compiled part passes over a name that it does not know.
if os.environ.get("MOEKERNELS_CPU_ISA", "portable") not in ("", *_CPU_ISAS):
    raise ImportError(
        f"MOEKERNELS_CPU_ISA must be one of {', '.join(_CPU_ISAS)}, got {os.environ['MOEKERNELS_CPU_ISA']!r}"
    )


class _BatchInvariant(contextlib.AbstractContextManager[None]):
    """The previous setting, restored when used as a context manager."""

    def __init__(self, previous: bool) -> None:
        self._previous = previous

    def __exit__(self, *exc: object) -> None:
        global _batch_invariant
        _batch_invariant = self._previous


def batch_invariant(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Make a token's output bits independent of the other tokens in its batch (capacity drops, and attention with a
    mask for padding, aside).

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


def allows_tf32() -> bool:
    """Whether torch may round float32 matrix products on a GPU to TF32, by whichever of its switches that was said.

    ``torch.backends.cuda.matmul.allow_tf32`` cannot be read any more once a newer switch was set. Dynamo cannot look
    inside, and compiles anew when the answer changes.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Private to torch: where it is missing, every device is asked.
_is_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on a device; None where it is off, and where there are no kernels."""
    if not _is_any_autocast_enabled():
        return None
    # torch.amp.is_autocast_available would say so of all others; the compiler of torch 2.11 cannot look into it.
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
