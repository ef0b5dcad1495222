"""Writing safetensors piece by piece: more than memory holds, and every piece where it can be read past the page cache.

The library writes what is in memory. Here a file's header comes first, padded with spaces so that the data begin at a
block of the file system; tensors whose size is a multiple of a block then all do, up to the first one that is not.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from moekernels._files import write_file
from moekernels.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX, SAFETENSORS_SHARD
from moekernels.checkpoint.reader import DTYPES

#: The size of a block.
BLOCK = 4096
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorHeader(NamedTuple):
    """What a file says about a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Group(NamedTuple):
    """Tensors that lie next to each other, such as those of an expert, and are in memory together.

    Attributes:
        headers: what they are.
        tensors: gives them, in that order; called when their turn comes.
    """

    headers: tuple[TensorHeader, ...]
    tensors: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers)


def write_packed(
    directory: Path,
    groups: Sequence[Group],
    max_shard_size: int,
    written: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write groups of tensors to files, with an index if there are several. A group is never split.

    Args:
        directory: where to; nothing of it is to be there.
        groups: in the order in which they will lie.
        max_shard_size: bytes of a file; one that holds a single group may be larger.
        written: called with the bytes of every tensor that was written.
    """
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    total = len(shards)
    names = [SAFETENSORS_SHARD.format(shard=i + 1, total=total) for i in range(total)] if total > 1 else [SAFETENSORS]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write_shard(file, shard, written)
    if total > 1:
        weight_map = {
            header.name: name
            for name, shard in zip(names, shards, strict=True)
            for group in shard
            for header in group.headers
        }
        index = {"metadata": {"total_size": sum(group.nbytes for group in groups)}, "weight_map": weight_map}
        write_file(directory / SAFETENSORS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def packed_size(groups: Sequence[Group]) -> int:
    """About the bytes that the files will take, and not less."""
    return sum(group.nbytes + sum(2 * len(header.name) + 512 for header in group.headers) for group in groups) + BLOCK


def _write_shard(file: IO[bytes], groups: Sequence[Group], written: Callable[[int], object]) -> None:
    file.write(header_of([header for group in groups for header in group.headers]))
    for group in groups:
        for header, tensor in zip(group.headers, group.tensors(), strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (header.shape, header.dtype), header
            file.write(bytes_of(tensor))
            written(header.nbytes)


def header_of(headers: Sequence[TensorHeader]) -> bytes:
    """How a file of these tensors, in this order, begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in headers:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, or of a dense copy of it."""
    tensor = tensor.contiguous()
    data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
    if isinstance(data, ctypes.Array):
        data._tensor = tensor  # type: ignore[attr-defined]  # lives as long as its memory is looked at
    return memoryview(data)
