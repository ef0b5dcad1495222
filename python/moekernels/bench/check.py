"""Whether what is timed is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moekernels.ops import Plan, reference

Definition = Callable[[torch.dtype], Any]  # the op's definition on inputs in that dtype
Terms = Callable[[], Mapping[int, float]]  # position of an output -> the size of what its elements sum

# One rounding of the largest element, for where plain PyTorch happens to be exact or nearly so.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# How far baselines may be apart, of the largest element: they round in other places.
_APART = 0.05
_PART = 1 << 24


class Mismatch(RuntimeError):
    """A kernel computed something else than it must."""


def tensors_of(outputs: Any) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple.

    Raises:
        TypeError: they are something else.
    """
    tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"tensors are wanted, got {type(outputs).__name__} of {type(tensors[0]).__name__}")
    return tensors


def check_definition(
    name: str, outputs: Any, definition: Definition, *, terms: Terms = dict, roundings: int = 1
) -> None:
    """Indices must be those of the definition. Values may err from it in float64 at most twice as much as the
    definition does in the dtype of the kernel, which is that of the first of them, and by a few roundings to it.

    Args:
        terms: of outputs whose few elements may be small by cancellation: a rounding is one of this size, not of the
            largest element. Called only where that decides, since it may take as long as the definition.
        roundings: how many in a row separate the inputs from an output.

    Raises:
        Mismatch: they do not.
    """
    actual = tensors_of(outputs)
    dtype = next((x.dtype for x in actual if x.is_floating_point()), torch.float32)
    plain, truth = tensors_of(definition(dtype)), tensors_of(definition(torch.float64))
    for position, (mine, rough, exact) in enumerate(zip(actual, plain, truth, strict=True)):
        which = f"{name}, output {position}" if len(actual) > 1 else name
        if mine.shape != exact.shape:
            raise Mismatch(f"{which}: has the shape {tuple(mine.shape)}, by its definition {tuple(exact.shape)}")
        if not mine.is_floating_point():
            if not torch.equal(mine, exact):
                raise Mismatch(f"{which}: differs from its definition in {int((mine != exact).sum())} places")
        elif mine.numel():
            error, share = _largest_difference(mine, exact), roundings * _ROUNDING[dtype]
            allowed = 2 * _largest_difference(rough, exact) + share * _largest(exact)
            if not error <= allowed:
                allowed += share * max(0.0, terms().get(position, 0.0) - _largest(exact))
            if not error <= allowed:
                raise Mismatch(f"{which}: differs from its definition by {error:.3g}, allowed is {allowed:.3g}")


def disagreements(outputs: dict[str, Any], *, terms: Terms = dict) -> dict[str, str]:
    """Who found something else than the first, beyond rounding, and what; `terms` as in :func:`check_definition`."""
    (_, expected), *others = outputs.items()
    found = {name: _disagreement(tensors_of(expected), tensors_of(theirs), terms) for name, theirs in others}
    return {name: what for name, what in found.items() if what is not None}


def _disagreement(expected: Sequence[Tensor], found: Sequence[Tensor], terms: Terms) -> str | None:
    shapes, others = ([tuple(x.shape) for x in outputs] for outputs in (expected, found))
    if shapes != others:
        return f"results of shape {', '.join(map(str, others))} instead of {', '.join(map(str, shapes))}"
    for position, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
        if not mine.numel():
            continue
        difference, largest = _largest_difference(mine, theirs), _largest(mine)
        # Written so that NaN fails.
        if not difference <= _APART * largest and not difference <= _APART * terms().get(position, 0.0):
            return f"results are {difference:.3g} apart, and the largest is {largest:.3g}"
    return None


def check_same(name: str, before: Any, after: Any) -> None:
    """The same input gives the same bits.

    Raises:
        Mismatch: it does not.
    """
    if not all(torch.equal(a, b) for a, b in zip(tensors_of(before), tensors_of(after), strict=True)):
        raise Mismatch(f"{name}: two calls gave different results")


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, a part after the other: both in float64 at once may be too much."""
    a, b = a.reshape(-1), b.reshape(-1)
    parts = zip(a.split(_PART), b.split(_PART), strict=True)
    return torch.stack([(x.double() - y.double()).abs().max() for x, y in parts]).max().item()


def largest_norm(products: Tensor) -> float:
    """Of sums over the last dimension: the root of the sum of squares, as which independent roundings add up.

    Args:
        products: ``[..., N]``, the terms.
    """
    return products.double().norm(dim=-1).max().item() if products.numel() else 0.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped_gemm(
    rows: Tensor, weight: Tensor, plan: Plan, dtype: torch.dtype, *, bias: Tensor | None = None, gather: bool = False,
    **options: Any,
) -> Tensor:  # fmt: skip
    """`reference.grouped_gemm` in a dtype, expert by expert: never are all weights there in that dtype."""
    outputs = []
    for e, (begin, end) in enumerate(pairwise(plan.expert_offsets.tolist())):
        chosen = reference.permute(rows, plan.token_of_row[begin:end]) if gather else rows[begin:end]
        offsets = torch.tensor([0, end - begin])
        outputs.append(
            reference.grouped_gemm(
                chosen.to(dtype),
                weight[e : e + 1].to(dtype),
                offsets,
                bias=None if bias is None else bias[e : e + 1].to(dtype),
                **options,
            )
        )
    return torch.cat(outputs)
