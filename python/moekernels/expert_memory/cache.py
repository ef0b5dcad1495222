"""The experts that are in memory."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from moekernels.expert_memory.files import ExpertFile, ExpertReadError
from moekernels.expert_memory.layout import Constant, ExpertSource, Span
from moekernels.expert_memory.memory import PIECE, Slot

#: Threads of a cache that read. A disk is busy with four; more change nothing.
READERS = 4
#: Tokens after which a visit counts half when it comes to who makes room.
_HALF_LIFE = 64


class ExpertCacheStats(NamedTuple):
    """What a cache has done.

    Attributes:
        hits: visits of an expert that was in memory, or on its way there.
        misses: visits for which it had to be read.
        evictions: experts whose memory another one took.
        bytes_read: from files, with what else lies in their first and last blocks.
        seconds_reading: in which something was being read.
        seconds_waited: of computing threads, for experts that were being read.
        budget: bytes that experts may take.
        bytes_in_memory: that they take.
        experts_in_memory: how many those are.
        num_experts: how many there are.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: int
    seconds_reading: float
    seconds_waited: float
    budget: int
    bytes_in_memory: int
    experts_in_memory: int
    num_experts: int

    def __str__(self) -> str:
        visits = max(self.hits + self.misses, 1)
        return (
            f"experts: {self.experts_in_memory} of {self.num_experts} in memory "
            f"({self.bytes_in_memory / 2**30:.2f} of {self.budget / 2**30:.2f} GiB); {self.hits} hits, {self.misses} "
            f"misses ({100 * self.hits / visits:.1f} % hits); {self.bytes_read / 1e9:.2f} GB read in "
            f"{self.seconds_reading:.1f} s, {self.seconds_waited:.1f} s waited"
        )


#: A layer, and one of its experts.
Key = tuple[int, int]


class _Visits(NamedTuple):
    """How often an expert was visited, those long ago counting less: as of a visit, and on the clock of visits."""

    value: float
    at: float


class _Entry:
    """An expert in memory, or on its way there.

    Attributes:
        pins: visits that need it now.
        pending: pieces still to be read.
        error: why one cannot be.
    """

    def __init__(self, key: Key, slot: Slot) -> None:
        self.key = key
        self.slot = slot
        self.pins = 0
        self.pending = 0
        self.error: Exception | None = None


class ExpertCache:
    """Experts in memory, up to a budget; the others are read when they are visited.

    Room is made by the expert with the fewest visits, a visit counting half for every 64 tokens since. Visits of
    experts that are not in memory count too. (`benchmarks/expert_eviction.py` compares this with other rules.)

    Several threads may visit experts at once. One that waits for memory holds none, so that there is always one that
    goes on.

    Args:
        layers: the experts of every layer.
        budget: bytes; enough for the largest expert.
        device: where the experts go.

    Attributes:
        budget: bytes that experts may take.

    Raises:
        ValueError: some expert does not fit the budget alone.
        ExpertReadError: a file cannot be opened.
    """

    def __init__(self, layers: Sequence[Sequence[ExpertSource]], budget: int, device: torch.device) -> None:
        sources = [source for layer in layers for source in layer]
        largest = max(sources, key=lambda source: source.layout.nbytes)
        if largest.layout.nbytes > budget:
            raise ValueError(
                f"expert_memory: {largest.name} takes {largest.layout.nbytes} bytes, and the budget is {budget}; it "
                "must be large enough for one expert, and holds more than one at a time if it is larger"
            )
        self.budget = budget
        self._layers = layers
        self._device = device
        self._num_experts = len(sources)
        self._files: dict[Path, ExpertFile] = {}
        for source in sources:
            for span in source.spans:
                if isinstance(span, Span) and span.file not in self._files:
                    self._files[span.file] = ExpertFile(span.file)
        self._entries: dict[Key, _Entry] = {}
        self._used = 0
        self._visits: dict[Key, _Visits] = {}
        self._clock = 0.0
        self.reset_stats()
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="moekernels-experts")
        self._reading = 0
        self._reading_since = 0.0

    def _restart(self) -> None:
        """In a process that was forked: the threads of its parent are not there, nor what they were reading."""
        self._start()
        for key, entry in list(self._entries.items()):
            entry.pins = 0
            if entry.pending:
                del self._entries[key]
                self._used -= entry.slot.layout.nbytes

    def __deepcopy__(self, memo: Any) -> ExpertCache:
        return self  # copies of a model share the budget

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model whose experts are in files (expert_memory) cannot be pickled; load it again instead")

    @property
    def num_weights(self) -> int:
        """Of all experts, in memory or not."""
        return sum(source.layout.num_weights for layer in self._layers for source in layer)

    def stats(self) -> ExpertCacheStats:
        """What the cache has done since it was made, or since :meth:`reset_stats`."""
        with self._changed:
            reading = self._seconds_reading + (time.perf_counter() - self._reading_since if self._reading else 0.0)
            return ExpertCacheStats(
                self._hits,
                self._misses,
                self._evictions,
                self._bytes_read,
                reading,
                self._seconds_waited,
                self.budget,
                self._used,
                sum(not entry.pending for entry in self._entries.values()),
                self._num_experts,
            )

    def reset_stats(self) -> None:
        """Count from zero again; what is in memory stays there."""
        self._hits = self._misses = self._evictions = self._bytes_read = 0
        self._seconds_reading = self._seconds_waited = 0.0
        self._reading_since = time.perf_counter()

    def visit(self, layer: int, experts: Sequence[int]) -> Generator[dict[int, dict[str, Tensor]], None, None]:
        """Go through experts of a layer, in groups, as they are in memory.

        All that are missing are read at once, as far as the budget goes; meanwhile those come that are there. The
        tensors of a group may be used until the next one is asked for, or the iterator closed.

        Yields:
            expert -> its tensors by name, in ascending order of experts.

        Raises:
            ExpertReadError: an expert cannot be read. The next visit tries again.
        """
        missing = [(layer, expert) for expert in experts]
        held: list[_Entry] = []
        with self._changed:
            self._count(missing)
        try:
            while missing or held:
                with self._changed:
                    missing = self._take(missing, held)
                    group = self._wait_for_some(held)
                if group:
                    # Not in the order of pinning, in which those that another thread had read come first.
                    yield {entry.key[1]: entry.slot.tensors for entry in sorted(group, key=lambda entry: entry.key)}
                    self._release(group, held)
        finally:
            self._release(list(held), held)

    # Below, but for reads, the lock is held.

    def _count(self, keys: list[Key]) -> None:
        """Visits of experts of a layer. The clock passes one half-life when all layers have so many."""
        self._clock += 1 / (_HALF_LIFE * len(self._layers))
        for key in keys:
            value, at = self._visits.get(key, _NEVER)
            self._visits[key] = _Visits(value * 0.5 ** (self._clock - at) + 1, self._clock)

    def _worth(self, entry: _Entry) -> float:
        """The logarithm of an expert's visits; that all of them lose value as time goes by is left out."""
        value, at = self._visits[entry.key]
        return math.log2(value) + at

    def _take(self, keys: list[Key], held: list[_Entry]) -> list[Key]:
        """Pin what is there, start to read what there is room for, and return what is left."""
        absent = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                absent.append(key)
            else:
                self._pin(entry, held)
                self._hits += 1
        left = []
        for key in absent:
            slot = self._room_for(self._layers[key[0]][key[1]])
            if slot is None:
                left.append(key)
            else:
                self._pin(self._read(key, slot), held)
                self._misses += 1
        return left

    def _pin(self, entry: _Entry, held: list[_Entry]) -> None:
        entry.pins += 1
        held.append(entry)

    def _room_for(self, source: ExpertSource) -> Slot | None:
        """Memory for an expert, free or that of another one; None if all are needed."""
        while self._used + source.layout.nbytes > self.budget:
            idle = [entry for entry in self._entries.values() if not entry.pins and not entry.pending]
            if not idle:
                return None
            victim = min(idle, key=self._worth)
            del self._entries[victim.key]
            self._evictions += 1
            if victim.slot.layout == source.layout:
                return victim.slot
            self._used -= victim.slot.layout.nbytes
        self._used += source.layout.nbytes
        return Slot(source.layout, self._device)

    def _read(self, key: Key, slot: Slot) -> _Entry:
        source = self._layers[key[0]][key[1]]
        entry = self._entries[key] = _Entry(key, slot)
        pieces = [piece for span in source.spans for piece in span.pieces(PIECE)]
        entry.pending = len(pieces)
        if self._reading == 0:
            self._reading_since = time.perf_counter()
        self._reading += 1
        for piece in pieces:
            self._pool.submit(self._read_piece, entry, piece)
        return entry

    def _read_piece(self, entry: _Entry, piece: Span | Constant) -> None:
        """Of a thread that reads, without the lock."""
        got, error = 0, None
        if entry.error is None:
            try:
                if isinstance(piece, Constant):
                    entry.slot.set(piece)
                else:
                    file = self._files[piece.file]
                    got = entry.slot.fill(file, piece)
                    file.check_unchanged()
            except Exception as problem:  # that of whoever waits for the expert
                error = problem
        with self._changed:
            self._bytes_read += got
            entry.error = entry.error or error
            entry.pending -= 1
            if entry.pending == 0:
                self._finish(entry)

    def _finish(self, entry: _Entry) -> None:
        self._reading -= 1
        if self._reading == 0:
            self._seconds_reading += time.perf_counter() - self._reading_since
        if entry.error is not None:
            del self._entries[entry.key]
            self._used -= entry.slot.layout.nbytes
        self._changed.notify_all()

    def _wait_for_some(self, held: list[_Entry]) -> list[_Entry]:
        """Those of the held experts that are there; none if others held all memory, of which some is free now."""
        if not held:
            self._changed.wait()
            return []
        start = time.perf_counter()
        while not (ready := [entry for entry in held if not entry.pending]):
            self._changed.wait()
        if (waited := time.perf_counter() - start) > 1e-4:
            self._seconds_waited += waited
        for entry in ready:
            if entry.error is not None:
                name = self._layers[entry.key[0]][entry.key[1]].name
                raise ExpertReadError(f"{name}: {entry.error}") from entry.error
        return ready

    def _release(self, group: list[_Entry], held: list[_Entry]) -> None:
        """Without the lock: let go of experts, which may be evicted now."""
        if not group:
            return
        with self._changed:
            for entry in group:
                entry.slot.used()
                entry.pins -= 1
                held.remove(entry)
            self._changed.notify_all()


_NEVER = _Visits(0.0, 0.0)
_caches: weakref.WeakSet[ExpertCache] = weakref.WeakSet()


def _restart_all() -> None:
    for cache in _caches:
        cache._restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restart_all)
