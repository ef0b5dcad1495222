"""Clocks: the wall on a CPU, events on the stream on a GPU.

All contestants of a row run in the same process, interleaved, so that a change of clock or a busy neighbour meets them
alike; a row reports medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]


class WallClock:
    """Seconds of a call on the CPU."""

    name = "wall clock"

    def measure(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class EventClock:
    """Seconds between two events around a call, with nothing of its data left in L2.

    Overwriting a buffer of several times the size of L2 comes first; while the GPU does that, the host enqueues the
    call, so that a call of a few kernels is not timed by how fast the host launches them.
    """

    name = "CUDA events, cold L2"

    def __init__(self, device: torch.device) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.uint8, device=device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def measure(self, run: Run) -> float:
        start, end = self._events
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def make_clock(device: torch.device) -> WallClock | EventClock:
    return EventClock(device) if device.type == "cuda" else WallClock()


def interleaved_times(
    contestants: Mapping[str, Run],
    device: torch.device,
    budget: float = 2.0,
    max_rounds: int = 200,
    min_rounds: int = 3,
) -> dict[str, list[float]]:
    """Seconds of the calls of each contestant.

    `budget` is the time that all rounds and the call before them may take; only `min_rounds` come before it.
    """
    clock = make_clock(device)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for run in contestants.values():
        clock.measure(run)
    for round_number in range(1, max_rounds + 1):
        for name, run in contestants.items():
            times[name].append(clock.measure(run))
        if round_number >= min_rounds and time.perf_counter() - begin > budget:
            break
    return times


def interleaved_medians(
    contestants: Mapping[str, Run],
    device: torch.device,
    budget: float = 2.0,
    max_rounds: int = 200,
    min_rounds: int = 3,
) -> dict[str, float]:
    """The medians of :func:`interleaved_times`."""
    times = interleaved_times(contestants, device, budget, max_rounds, min_rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def in_one_graph(runs: Sequence[Run], device: torch.device) -> Run:
    """The calls one after another, on a GPU as the replay of one CUDA graph: no time of the host is in it.

    The runs should read different weights, as the layers of a model do, or else they find them in L2.
    """
    if device.type != "cuda":
        return lambda: [run() for run in runs]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []  # outputs, so that none takes another's memory
    with torch.cuda.graph(graph):
        kept.extend(run() for run in runs)

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: list[object] = kept) -> None:
        graph.replay()

    return replay
