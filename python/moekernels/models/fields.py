"""The fields of a configuration: each with its default, what it means, and what it must be.

A configuration lists them in its class body, ``vocab_size: int = count(50304, "number of tokens")``;
:class:`moekernels.models.PretrainedConfig` makes constructor, documentation and checks of them.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekernels.nn.activations import op_activation

#: Says what a value must be, given the value and the configuration; None if it is that.
Check = Callable[[Any, Any], str | None]

# More than any model has, and still little enough to build its modules in seconds. Kernels count in 32 bits.
MAX_LAYERS, MAX_SIZE = 2**12, 2**31 - 1


@dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
        default: its value unless one is given.
        doc: what it means.
        checks: what it must be.
        like: the field whose value it takes in place of None.
    """

    default: Any
    doc: str
    checks: tuple[Check, ...] = ()
    like: str | None = None


def setting(default: Any, doc: str, *checks: Check) -> Any:
    """A field with its own checks, or none."""
    return Field(default, doc, checks)


def count(default: int | None, doc: str, *checks: Check, optional: bool = False, like: str | None = None) -> Any:
    """A positive integer; or None if it is `optional`, or if it is then the same as the field `like`."""
    return Field(default, doc, ((_or_none(is_count) if optional else is_count), *checks), like)


def layers(default: int | None, doc: str, *, like: str | None = None) -> Any:
    """A number of layers."""
    return Field(default, doc, (is_number_of_layers,), like)


def number(default: float, doc: str, *, low: float = 0.0, high: float = float("inf")) -> Any:
    """A number from `low` to `high`."""

    def check(value: Any, config: Any) -> str | None:
        is_valid = isinstance(value, int | float) and low <= value <= high
        return None if is_valid else f"a number from {low} to {high}"

    return Field(default, doc, (check,))


def choice(default: str, doc: str, *choices: str) -> Any:
    """One of some words."""
    return Field(default, doc, (must_be(f"one of {', '.join(choices)}", lambda value: value in choices),))


def token(default: int | None, doc: str) -> Any:
    """A token, or None."""
    return Field(default, doc, (is_token,))


def activation(default: str, doc: str) -> Any:
    """The name of an activation."""

    def check(value: Any, config: Any) -> None:
        op_activation(value)

    return Field(default, doc, (check,))


def inherited(config: Any, name: str) -> Any:
    """A field of another configuration, listed again for its place."""
    return config._fields[name]


def must_be(expected: str, is_valid: Callable[[Any], bool]) -> Check:
    """A check from a predicate."""
    return lambda value, config: None if is_valid(value) else expected


def is_integer(value: Any, low: int) -> bool:
    """Whether it is an integer of at least `low`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_count(value: Any, config: Any = None, high: int = MAX_SIZE) -> str | None:
    """Holds a value to be a positive integer."""
    if not is_integer(value, 1):
        return "a positive integer"
    return None if value <= high else f"at most {high}"


def is_number_of_layers(value: Any, config: Any = None) -> str | None:
    """Holds a value to be a number of layers."""
    return is_count(value, config, MAX_LAYERS)


def is_token(value: Any, config: Any) -> str | None:
    """Holds a value to be a token, counted from the end if it is negative, or None."""
    size = config.vocab_size
    is_valid = value is None or (is_integer(value, -size) and value < size)
    return None if is_valid else f"a token id below vocab_size = {size}, or None"


def _or_none(check: Check) -> Check:
    return lambda value, config: None if value is None else check(value, config)


def signature(fields: Mapping[str, Field], annotations: Mapping[str, Any]) -> inspect.Signature:
    """Of a constructor that takes the fields in their order, and any other keyword."""
    kinds = inspect.Parameter
    own = [
        kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=field.default, annotation=annotations[name])
        for name, field in fields.items()
    ]
    first, last = kinds("self", kinds.POSITIONAL_ONLY), kinds("kwargs", kinds.VAR_KEYWORD, annotation="Any")
    return inspect.Signature([first, *own, last], return_annotation=None)


def documentation(summary: str, fields: Mapping[str, Field]) -> str:
    """The docstring of a configuration: what its class body says, and the fields as arguments."""
    listed = {**{name: field.doc for name, field in fields.items()}, "**kwargs": _OTHERS}
    lines = [
        textwrap.fill(f"{name}: {doc}.", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, doc in listed.items()
    ]
    return "\n".join((inspect.cleandoc(summary), "", "Args:", *lines))


_OTHERS = "the fields of :class:`moekernels.models.PretrainedConfig`; others are kept"
