"""Which of the kernels' activations a module's own gate is.

A gate is known by what it computes, not by its class: transformers copies the formulas of a few models into many, and
may change one. So each is called, once per class and its numbers, on values that reach beyond its bounds, and compared
with what the kernels have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from moekernels import ops
from moekernels.integrations.transformers.experts import activation_name
from moekernels.ops.activation import ACTIVATION_FUNCTIONS

# Attributes of experts that a gate may read.
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")


def activation_of(module: Any) -> str | ops.Swiglu | None:
    """What the kernels call what lies between a module's projections; None if they do not have it."""
    activation = activation_name(getattr(module, "act_fn", None))
    gate = getattr(type(module), "_apply_gate", None)
    if not getattr(module, "has_gate", True) or gate is None or gate.__name__ == "_default_apply_gate":
        return activation
    if "_apply_gate" in module.__dict__ or (activation is None and hasattr(module, "act_fn")):
        return None
    numbers = tuple((name, _constant(getattr(module, name, None))) for name in (*_ALPHAS, *_LIMITS))
    found = _gate_of(type(module), activation, numbers)
    return ops.Swiglu(*found) if isinstance(found, tuple) else found


def _constant(value: Any) -> Any:
    """The value itself, on which compiled code then depends: torch.compile makes a float that has changed a symbol."""
    return guard_scalar(value) if isinstance(value, float) else value


@torch.compiler.assume_constant_result
def _gate_of(cls: type, activation: str | None, numbers: tuple[tuple[str, Any], ...]) -> str | tuple[Any, ...] | None:
    """Named, or as the fields of a Swiglu: what torch.compile takes for constants."""
    found = _known_gate(cls._apply_gate, activation, numbers)  # type: ignore[attr-defined]
    return astuple(found) if isinstance(found, ops.Swiglu) else found


@cache
def _known_gate(
    gate: Callable[..., Tensor], activation: str | None, numbers: tuple[tuple[str, Any], ...]
) -> str | ops.Swiglu | None:
    attributes = {name: value for name, value in numbers if isinstance(value, (int, float)) and value > 0}
    limits = [float(attributes[name]) for name in _LIMITS if name in attributes]
    stand_in = SimpleNamespace(**attributes)
    if activation is not None:
        stand_in.act_fn = ACTIVATION_FUNCTIONS[activation]
    width = min([4.0, *(2 * limit for limit in limits)])
    values = torch.randn(256, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * width
    try:
        wanted = gate(stand_in, values).double()
    except Exception:  # it reads what is not known here
        return None
    alphas = {1.0, *(float(attributes[name]) for name in _ALPHAS if name in attributes)}
    for known in _candidates(activation, alphas, {torch.inf, *limits}):
        got = known(values) if isinstance(known, ops.Swiglu) else _gated(known, values)
        if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-5, atol=1e-6):
            return known
    return None


def _candidates(activation: str | None, alphas: set[float], limits: set[float]) -> Iterator[str | ops.Swiglu]:
    if activation is not None:
        yield activation
    for alpha, limit, shift, interleaved in itertools.product(alphas, limits, (0.0, 1.0), (False, True)):
        yield ops.Swiglu(alpha, limit, shift, interleaved)


def _gated(activation: str, values: Tensor) -> Tensor:
    gate, value = values.chunk(2, dim=-1)
    return ACTIVATION_FUNCTIONS[activation](gate) * value
