"""Which instruction sets the tests use: those that this processor has. The others are skipped, with the reason.

`MOEKERNELS_CPU_ISA` makes the processor a lesser one here too.
"""

from __future__ import annotations

from typing import Any

import pytest

import moekernels

ALL_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def missing_isa(name: str) -> str | None:
    """Why the kernels of an instruction set cannot run here, or None."""
    present = moekernels.build_info()["cpu_isas"]
    return None if name in present else f"no {name} here; the best is {present[-1]}"


def isas(*names: str) -> list[Any]:
    """Instruction sets as parameters of a test; all of them if none is named."""
    return [isa_case(name) for name in names or ALL_ISAS]


def isa_case(isa: str, *others: Any) -> Any:
    """An instruction set, and what goes with it, as one case of a test."""
    reason = missing_isa(isa)
    return pytest.param(isa, *others, marks=[pytest.mark.skip(reason=reason)] if reason else [])


def needs_isa(name: str) -> pytest.MarkDecorator:
    """Skips a test, or all of a file, where the processor lacks an instruction set."""
    reason = missing_isa(name)
    return pytest.mark.skipif(reason is not None, reason=reason or "")
