"""Where an expert's weights lie in memory, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.quantization import Format, QuantizedWeight

#: File systems read past the page cache in blocks; memory, offset and length must be multiples of theirs.
ALIGNMENT = 4096
#: A tensor of an expert begins where a vector load crosses no line of the processor's cache.
_LINE = 64


class Field(NamedTuple):
    """Memory for one tensor of a file, or for several with rows of the same.

    Attributes:
        name: of the weight, or of its part.
        shape, dtype: of one expert.
        offset: where it begins in the expert's memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor, in bytes of memory ``[nbytes]`` uint8."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class Weight(NamedTuple):
    """A tensor that an expert computes with.

    Attributes:
        name: of the parameter that would hold it for all experts of a layer.
        shape: of one expert.
        dtype: in memory; of a quantised weight, what products with it are computed in.
        format: of a quantised weight, whose parts are fields of their own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format | None = None

    def fields(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """What it consists of: names, shapes and dtypes."""
        if self.format is None:
            return [(self.name, self.shape, self.dtype)]
        parts, size = self.format.parts(self.shape[-1]), math.prod(self.shape)
        return [(part_name(self.name, name), (part.size(size),), part.dtype) for name, part in parts.items()]

    def of(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Put together; what is quantised as a stack of one expert, which kernels read."""
        if self.format is None:
            return fields[self.name]
        parts = {part: fields[part_name(self.name, part)] for part in self.format.parts(self.shape[-1])}
        stack = {part: field.unsqueeze(0) for part, field in parts.items()}
        return QuantizedWeight(stack, self.format, (1, *self.shape), dtype=self.dtype)


def part_name(weight: str, part: str) -> str:
    """The field that is a part of a quantised weight."""
    return f"{weight}.{part}"


class Layout(NamedTuple):
    """The memory of one expert: its fields one behind the other, the largest first. Layers of one shape share it."""

    weights: tuple[Weight, ...]
    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> Layout:
        """For what an expert computes with."""
        unplaced = [Field(*entry, 0) for weight in weights for entry in weight.fields()]
        fields: list[Field] = []
        end = 0
        for field in sorted(unplaced, key=lambda field: -field.nbytes):
            fields.append(field._replace(offset=-(-end // _LINE) * _LINE))
            end = fields[-1].offset + field.nbytes
        return cls(tuple(weights), tuple(fields), -(-end // ALIGNMENT) * ALIGNMENT)

    @property
    def num_weights(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.weights)

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """What the expert in some memory computes with, by name."""
        fields = {field.name: field.view(memory) for field in self.fields}
        return {weight.name: weight.of(fields) for weight in self.weights}


class Span(NamedTuple):
    """Bytes of a file that fill a part of an expert's memory.

    Attributes:
        file: where they are.
        name: of the tensor there.
        offset, nbytes: of the bytes.
        stored: their dtype in the file.
        dtype: in memory.
        target: where that part of the expert's memory begins.
    """

    file: Path
    name: str
    offset: int
    nbytes: int
    stored: torch.dtype
    dtype: torch.dtype
    target: int

    def pieces(self, nbytes: int) -> list[Span]:
        """The same bytes in several spans of at most `nbytes`, a multiple of what an element takes."""
        return [
            self._replace(
                offset=self.offset + begin,
                nbytes=min(nbytes, self.nbytes - begin),
                target=self.target + begin // self.stored.itemsize * self.dtype.itemsize,
            )
            for begin in range(0, self.nbytes, nbytes)
        ]


class Constant(NamedTuple):
    """A number that fills a part of an expert's memory.

    Attributes:
        value: the number, in `dtype`.
        target, nbytes: that part of the memory.
    """

    value: float
    dtype: torch.dtype
    target: int
    nbytes: int

    def pieces(self, nbytes: int) -> list[Constant]:
        """It is never large."""
        return [self]


class ExpertSource(NamedTuple):
    """One expert: what messages call it, its memory, and what fills it."""

    name: str
    layout: Layout
    spans: tuple[Span | Constant, ...]


class Stored(NamedTuple):
    """A tensor of the checkpoint: its file, its first byte there, its shape and dtype.

    A quantised weight has a format, and each of its parts is such a tensor, or a number that all of it is.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format | None = None
    parts: Mapping[str, Stored | float] = {}


def spans_of(
    field: Field, expert: int, stored: Mapping[tuple[int | None, int], Stored | float]
) -> list[Span | Constant]:
    """What fills one tensor of an expert.

    Args:
        field: the tensor.
        expert: which one.
        stored: (expert, part) -> what the checkpoint has: parts are equal blocks of rows; (None, 0) is a stack of all.
    """
    if (None, 0) in stored:
        return [_span(stored[None, 0], field, expert, field.offset, field.nbytes)]
    parts: list[Stored | float] = []
    while (part := stored.get((expert, len(parts)))) is not None:
        parts.append(part)
    size = field.nbytes // len(parts)
    return [_span(part, field, 0, field.offset + i * size, size) for i, part in enumerate(parts)]


def _span(stored: Stored | float, field: Field, index: int, target: int, nbytes: int) -> Span | Constant:
    """What fills bytes of a field: the tensor of that index, if there are several one behind the other."""
    if isinstance(stored, float):
        return Constant(stored, field.dtype, target, nbytes)
    size = nbytes // field.dtype.itemsize * stored.dtype.itemsize
    return Span(stored.file, stored.name, stored.offset + index * size, size, stored.dtype, field.dtype, target)
