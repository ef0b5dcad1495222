"""Which inputs run together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
# Batches that are sorted by length together; what comes of them appears together too.
BATCHES_PER_WINDOW = 16


def windows(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of inputs of like length in batches, the longest first; one by one they keep their order."""
    order = range(len(lengths)) if batch_size == 1 else sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return list(windows(order, batch_size))


def stack(rows: Sequence[Sequence[int]], filler: int, side: str) -> Tensor:
    """Rows of ids as one tensor int64 `[B, longest]`, padded with `filler` on a side."""
    width = max(len(row) for row in rows)
    stacked = torch.full((len(rows), width), filler, dtype=torch.long)
    for index, row in enumerate(rows):
        begin = width - len(row) if side == "left" else 0
        stacked[index, begin : begin + len(row)] = torch.tensor(row, dtype=torch.long)
    return stacked
