"""Files that are mapped into memory: pages that have been read count as resident until they are given back."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor


def released(tensors: Iterator[tuple[str, Tensor]], path: Path) -> Iterator[tuple[str, Tensor]]:
    """The same names and tensors; the pages of each one that maps `path` are given back when the next is asked for.

    Nothing is lost: a page that is looked at again is read again. Pages that were written to would be, so tensors are
    not to be changed.
    """
    ranges: list[tuple[int, int]] | None = None
    for name, tensor in tensors:
        yield name, tensor
        if ranges is None:  # a file may be mapped with its first tensor
            ranges = _ranges(path)
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and any(low <= begin and end <= high for low, high in ranges):
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _ranges(path: Path) -> list[tuple[int, int]]:
    """Where this process has the file mapped; nowhere, where the system does not say (it is not Linux)."""
    try:
        name = os.path.realpath(path)
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            found = [line.split(maxsplit=5) for line in maps]
    except OSError:
        return []
    addresses = [fields[0].split("-") for fields in found if len(fields) == 6 and fields[5].rstrip("\n") == name]
    return [(int(low, 16), int(high, 16)) for low, high in addresses]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
