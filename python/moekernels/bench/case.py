"""One piece of work, and all who do it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekernels.bench.check import Definition, Terms, check_agreement, check_definition, check_same
from moekernels.bench.clocks import Run, interleaved_medians, make_clock
from moekernels.bench.roofs import Roofs, name_of
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.bench.table import Row

Note = Callable[[str], object]


@dataclass
class Case:
    """`ours` and others that compute the same, with the work it cannot avoid.

    Attributes:
        name: the kernel, or the layer.
        bytes, flops: see :class:`~moekernels.bench.table.Row`.
        bounds: as much work as `ours`, another result.
        definition: what `ours` must compute.
        terms, roundings: how far from it it may be; see :func:`~moekernels.bench.check.check_definition`.
        captured: makes of contestants what is timed instead: a CUDA graph of `captured_calls` calls. A contestant that
            cannot be captured is missing from it.
    """

    name: str
    ours: Run
    baselines: dict[str, Run]
    bytes: float
    flops: float = 0.0
    bounds: dict[str, Run] = field(default_factory=dict)
    definition: Definition | None = None
    terms: Terms = dict
    roundings: int = 1
    captured: Callable[[], dict[str, Run]] | None = None
    captured_calls: int = 1


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def say(note: str) -> None:
    print(f"  {note}", file=sys.stderr)


def working(contestants: dict[str, Run], device: torch.device, note: Note = say) -> dict[str, Any]:
    """What those return that run here: an implementation may lack a dtype, a device or a shape."""
    outputs: dict[str, Any] = {}
    for name, run in contestants.items():
        try:
            outputs[name] = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            outputs.pop(name, None)
            note(f"without {name}: {str(error).partition(chr(10))[0][:150]}")
    return outputs


def measure(
    case: Case,
    shape: LayerShape,
    x: LayerInputs,
    routing: str,
    roofs: Roofs | None,
    budget: float,
    *,
    check: bool = False,
    baselines: bool = True,
    bounds: bool = False,
    min_rounds: int = 1,
    note: Note = say,
) -> Row:
    """Times a case, once its results have been compared.

    Args:
        roofs: of this machine; None leaves them out of the row.
        budget: seconds; a case whose calls take longer is measured `min_rounds` times.
        check: hold the result against the definition, and against that of a call after the timing.
        baselines, bounds: whether to time those too.
        note: is told what cannot run here.

    Raises:
        Mismatch: somebody computes something else.
    """
    device, dtype = x.hidden.device, x.hidden.dtype
    title = f"{shape.name} {case.name}, {x.hidden.shape[0]} tokens, {routing}, {name_of(dtype)}"
    ours, contestants = case.ours(), {"moekernels": case.ours}
    if check and case.definition is not None:
        check_definition(title, ours, case.definition, terms=case.terms, roundings=case.roundings)
    if baselines:
        found = working(case.baselines, device, note)
        check_agreement(title, {"moekernels": ours, **found}, terms=case.terms)
        contestants |= {name: case.baselines[name] for name in found}
    if bounds:
        contestants |= {name: case.bounds[name] for name in working(case.bounds, device, note)}

    clock, calls = make_clock(device).name, dict.fromkeys(contestants, 1)
    if case.captured is not None:
        captured = {name: run for name, run in case.captured().items() if name in contestants}
        contestants |= captured
        calls |= dict.fromkeys(captured, case.captured_calls)
        clock = f"CUDA graph of {case.captured_calls} layers"
    medians = interleaved_medians(contestants, device, budget, min_rounds=min_rounds)
    medians = {name: seconds / calls[name] for name, seconds in medians.items()}
    seconds = medians.pop("moekernels")
    if check:
        check_same(title, ours, case.ours())
    roof = None if roofs is None else roofs.seconds(case.flops, case.bytes, dtype) / seconds
    name = f"{shape.name} {case.name}".strip()
    return Row(name, x.hidden.shape[0], routing, name_of(dtype), seconds, case.flops, case.bytes, roof, medians, clock)
