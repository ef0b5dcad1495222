"""Which experts are in memory, and when."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekernels.expert_memory import ExpertCache
from moekernels.expert_memory.files import ExpertFile
from moekernels.expert_memory.layout import Span
from moekernels.expert_memory.memory import Slot
from tests.expert_memory.conftest import EXPERT, counts, load


@pytest.fixture
def cache(saved: Callable[..., Path]) -> ExpertCache:
    """Of 3 layers with 4 experts each, 3 of which fit."""
    found: ExpertCache = load("olmoe", saved("olmoe"), expert_memory=3 * EXPERT).expert_cache
    return found


@pytest.fixture
def weights(saved: Callable[..., Path]) -> list[torch.Tensor]:
    """The down-projections of every layer, by an in-memory model."""
    return [layer.mlp.experts.down_proj for layer in load("olmoe", saved("olmoe")).model.layers]


def visit(cache: ExpertCache, weights: list[torch.Tensor], layer: int, *experts: int) -> list[list[int]]:
    """The groups in which experts come, whose weights are theirs."""
    groups = []
    for group in cache.visit(layer, experts):
        for expert, tensors in group.items():
            assert torch.equal(tensors["down_proj"], weights[layer][expert])
        groups.append(sorted(group))
    assert sorted(expert for group in groups for expert in group) == sorted(experts)
    return groups


def test_hits_misses_and_evictions(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    visit(cache, weights, 0, 0, 1)
    assert counts(cache) == (0, 2, 0)
    assert visit(cache, weights, 0, 1, 0) == [[0, 1]]
    assert counts(cache) == (2, 2, 0)
    visit(cache, weights, 1, 0)
    assert counts(cache) == (2, 3, 0)
    visit(cache, weights, 2, 3)  # in the place of the one that was visited once
    visit(cache, weights, 0, 1, 0)
    assert counts(cache) == (4, 4, 1)
    visit(cache, weights, 1, 0)
    assert counts(cache) == (4, 5, 2)
    visit(cache, weights, 2, 3)  # the second visit of either: the later one counts more
    assert counts(cache) == (4, 6, 3)
    visit(cache, weights, 1, 0)
    assert counts(cache) == (4, 7, 4)


def test_visits_of_long_ago_count_less(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    for _ in range(8):
        visit(cache, weights, 0, 0)
    visit(cache, weights, 0, 1, 2)
    visit(cache, weights, 0, 3)
    assert counts(cache)[2] == 1
    visit(cache, weights, 0, 0)
    assert counts(cache)[2] == 1  # which stayed
    for _ in range(64 * 3 * 5):  # five half-lives
        visit(cache, weights, 1, 0)
    before = counts(cache)[1]
    for expert in (1, 2, 3, 1):
        visit(cache, weights, 1, expert)
    visit(cache, weights, 0, 0)
    assert counts(cache)[1] == before + 5  # which did not


def test_all_experts_of_a_layer_in_less_memory(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    for _ in range(2):
        visit(cache, weights, 2, 3, 2, 1, 0)
    assert cache.stats().bytes_in_memory == 3 * EXPERT


def test_what_is_there_comes_first(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    visit(cache, weights, 0, 2)
    first = visit(cache, weights, 0, 0, 1, 2)[0]
    assert 2 in first


def test_a_group_is_in_order_whoever_had_it_read(cache: ExpertCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 3 is on its way for another thread, 1 is asked for with it, and both arrive at once."""
    wait, arrive, fill = cache._changed.wait, threading.Event(), Slot.fill
    found: list[list[int]] = []

    def wait_for_all() -> None:
        while any(entry.pending for entry in cache._entries.values()):
            wait()

    def fill_later(slot: Slot, file: ExpertFile, span: Span) -> int:
        arrive.wait()
        return fill(slot, file, span)

    monkeypatch.setattr(Slot, "fill", fill_later)
    monkeypatch.setattr(cache._changed, "wait", wait_for_all)
    threads = []
    for experts in ([3], [1, 3]):
        threads.append(threading.Thread(target=lambda e: found.extend(map(list, cache.visit(0, e))), args=(experts,)))
        threads[-1].start()
        while (0, experts[0]) not in cache._entries:
            time.sleep(0.001)
    arrive.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == [[1, 3], [3]]


def test_what_a_visit_needs_is_not_evicted_for_it(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    visit(cache, weights, 0, 0)
    visit(cache, weights, 0, 1)
    visit(cache, weights, 0, 2)
    visit(cache, weights, 0, 3, 0, 1)  # expert 0 is the oldest
    assert counts(cache) == (2, 4, 1)


def test_a_visit_that_ends_early_lets_go(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    visited = cache.visit(0, [0, 1, 2])
    next(visited)
    visited.close()
    visit(cache, weights, 1, 0, 1, 2)
    assert cache.stats().evictions == 3


def test_statistics(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    visit(cache, weights, 0, 0, 1)
    stats = cache.stats()
    assert stats.bytes_read >= 2 * 24 * 16 * 3 * 4
    assert stats.experts_in_memory == 2
    assert 0 < stats.seconds_reading < 10
    assert "2 of 12 in memory" in str(stats)
    assert "0 hits, 2 misses (0.0 % hits)" in str(stats)
    cache.reset_stats()
    assert cache.stats()[:6] == (0, 0, 0, 0, 0.0, 0.0)
    assert cache.stats().experts_in_memory == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_after_a_fork(cache: ExpertCache, weights: list[torch.Tensor]) -> None:
    """A forked process has what was in memory, and threads of its own for the rest."""
    visit(cache, weights, 0, 0, 1)
    child = os.fork()
    if child == 0:
        try:
            visit(cache, weights, 0, 1)
            visit(cache, weights, 1, 0, 1, 2)
            os._exit(0 if counts(cache) == (1, 5, 2) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    visit(cache, weights, 0, 0, 1)
    assert counts(cache) == (2, 2, 0)
