"""One piece of work, and all who do it."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekernels.bench.check import Definition, Terms, check_definition, check_same, disagreements, tensors_of
from moekernels.bench.clocks import Run, interleaved_times, make_clock
from moekernels.bench.roofs import Roofs, name_of
from moekernels.bench.shapes import LayerInputs, LayerShape
from moekernels.bench.table import Row

Note = Callable[[str], object]

_ROOF = "the nearer roof"
_WORTH_A_PROBE = 1e-3  # seconds

# How PyTorch says that an operation does not exist for a dtype or a device.
_LACKING = re.compile("not (yet )?(implemented|supported)|only supported|unsupported", re.IGNORECASE)


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


def fastest_quarter(seconds: Sequence[float]) -> float:
    """What a quarter of the calls take at most."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]


def say(note: str) -> None:
    print(f"  {note}", file=sys.stderr)


def results(
    contestants: dict[str, Run], device: torch.device, note: Note = say
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, str]]:
    """What those return that run here, and why others fail. `note` is told of who lacks a dtype, a device or a shape,
    and of nothing that went wrong."""
    outputs: dict[str, tuple[Tensor, ...]] = {}
    failures: dict[str, str] = {}
    for name, run in contestants.items():
        try:
            found = tensors_of(run())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            outputs[name] = found
        except Exception as error:  # of others, who may do anything
            what = str(error).partition("\n")[0][:150]
            if isinstance(error, NotImplementedError) or _LACKING.search(what):
                note(f"without {name}: {what}")
            else:
                failures[name] = f"fails: {type(error).__name__}: {what}"
    return outputs, failures


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
        roofs: of this machine; None leaves them out of the row. For work of a millisecond and more the nearer one is
            measured again, in turns with the case, and the fastest quarters of both are compared: a busy neighbour
            slows single calls of either. (Less work is left the caches, which a probe would empty.)
        budget: seconds; a case whose calls take longer is measured `min_rounds` times.
        check: hold the result against the definition, and against that of a call after the timing.
        baselines, bounds: whether to time those too.
        note: is told what cannot run here.

    Returns:
        The row. Baselines that fail or compute something else are named in it, and not timed.

    Raises:
        Mismatch: ours is not what it must be.
    """
    device, dtype = x.hidden.device, x.hidden.dtype
    title = f"{shape.name} {case.name}, {x.hidden.shape[0]} tokens, {routing}, {name_of(dtype)}"
    failures: dict[str, str] = {}
    ours, contestants = case.ours(), {"moekernels": case.ours}
    if check and case.definition is not None:
        check_definition(title, ours, case.definition, terms=case.terms, roundings=case.roundings)
    if baselines:
        found, failures = results(case.baselines, device, note)
        different = disagreements({"moekernels": ours, **found}, terms=case.terms)
        failures |= {name: f"differs: {what}" for name, what in different.items()}
        contestants |= {name: case.baselines[name] for name in found if name not in failures}
    if bounds:
        found, failed = results(case.bounds, device, note)
        contestants |= {name: case.bounds[name] for name in found}
        failures |= failed

    clock, calls = make_clock(device).name, dict.fromkeys(contestants, 1)
    if case.captured is not None:
        captured = {name: run for name, run in case.captured().items() if name in contestants}
        contestants |= captured
        calls |= dict.fromkeys(captured, case.captured_calls)
        clock = f"CUDA graph of {case.captured_calls} layers"
    probe = None
    if roofs is not None and roofs.seconds(case.flops, case.bytes, dtype) >= _WORTH_A_PROBE:
        probe = roofs.probe(case.flops, case.bytes, dtype, device)
    turns = contestants if probe is None else {**contestants, _ROOF: probe.run}
    times = interleaved_times(turns, device, budget, min_rounds=min_rounds)
    medians = {name: statistics.median(times[name]) / calls[name] for name in contestants}
    seconds = medians.pop("moekernels")
    roof = None if roofs is None else roofs.seconds(case.flops, case.bytes, dtype) / seconds
    if probe is not None:
        best = {name: fastest_quarter(values) for name, values in times.items()}
        roof = best[_ROOF] / probe.times / (best["moekernels"] / calls["moekernels"])
    if check:
        check_same(title, ours, case.ours())
    name, num_tokens, dtype_name = f"{shape.name} {case.name}".strip(), x.hidden.shape[0], name_of(dtype)
    return Row(name, num_tokens, routing, dtype_name, seconds, case.flops, case.bytes, roof, medians, clock, failures)
