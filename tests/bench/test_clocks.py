from __future__ import annotations

import pytest
import torch

from moekernels.bench.clocks import WallClock, in_one_graph, interleaved_medians, interleaved_times, make_clock
from tests.bench.conftest import SteppingClock


def test_contestants_take_turns(stepping: SteppingClock, cpu: torch.device) -> None:
    calls: list[str] = []
    times = interleaved_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, cpu, max_rounds=4)
    assert calls == ["a", "b"] * 5  # one call before the rounds
    assert times == {"a": [0.0] * 4, "b": [0.0] * 4}


def test_median_leaves_out_what_comes_first_and_what_is_odd(stepping: SteppingClock, cpu: torch.device) -> None:
    run = stepping.takes(50.0, 1.0, 9.0, 2.0)
    assert interleaved_medians({"a": run}, cpu, budget=1e9, max_rounds=3) == {"a": 2.0}


@pytest.mark.parametrize(
    ("seconds", "budget", "min_rounds", "rounds"), [(1.0, 5.5, 1, 5), (1.0, 5.5, 8, 8), (60.0, 1.0, 1, 1)]
)
def test_budget(
    stepping: SteppingClock, cpu: torch.device, seconds: float, budget: float, min_rounds: int, rounds: int
) -> None:
    times = interleaved_times({"a": stepping.takes(seconds)}, cpu, budget, min_rounds=min_rounds)
    assert times["a"] == [seconds] * rounds


def test_wall_clock(cpu: torch.device) -> None:
    clock = make_clock(cpu)
    assert isinstance(clock, WallClock) and 0.0 < clock.measure(lambda: torch.ones(10)) < 10.0
    calls: list[int] = []
    in_one_graph([lambda i=i: calls.append(i) for i in range(3)], cpu)()  # type: ignore[misc]
    assert calls == [0, 1, 2]
