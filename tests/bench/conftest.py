from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from moekernels.bench import clocks
from moekernels.bench.shapes import LayerShape

# One layer for each of the blocks of transformers, as small as they allow.
KINDS = (
    LayerShape("olmoe", 24, 16, 6, 3),
    LayerShape("phimoe", 24, 16, 6, 2, scoring="sparsemixer"),
    LayerShape("nllb", 24, 40, 6, 2, activation="relu", gated=False, bias=True, scoring="top2_gate"),
    LayerShape("switch", 24, 40, 6, 1, activation="relu", gated=False),
)


class SteppingClock:
    """A call takes as many seconds as its function says, and no time passes otherwise."""

    name = "stepping"

    def __init__(self) -> None:
        self.now = 0.0

    def measure(self, run: Callable[[], object]) -> float:
        begin = self.now
        run()
        return self.now - begin

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A function whose calls take these times, the last of them again and again."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> SteppingClock:
    clock = SteppingClock()
    monkeypatch.setattr(clocks, "make_clock", lambda device: clock)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
