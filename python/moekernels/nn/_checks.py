"""Checks of constructor arguments; messages have the form of those of model configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check(owner: object, name: str, value: Any, is_valid: bool, expected: str) -> None:
    """Raises ValueError unless `is_valid`, naming the argument, what it must be and what it was."""
    if not is_valid:
        raise ValueError(f"{type(owner).__name__}: {name} must be {expected}, got {value!r}")


def check_counts(owner: object, **counts: Any) -> None:
    for name, value in counts.items():
        is_valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
        check(owner, name, value, is_valid, "a positive integer")


def check_one_of(owner: object, name: str, value: Any, choices: Sequence[str]) -> None:
    check(owner, name, value, value in choices, f"one of {', '.join(choices)}")


def check_share(owner: object, name: str, value: Any, high: float = 1.0) -> None:
    is_valid = isinstance(value, int | float) and 0 <= value <= high
    check(owner, name, value, is_valid, f"a number from 0 to {high:g}")
