"""How weights are stored in few bits: what a format is, and the list of those there are.

A format is defined on one matrix ``[N, K]``, in plain PyTorch. It is a frozen dataclass whose fields are its options; a
further one is a class and a line of :data:`FORMATS`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

Parts: TypeAlias = Mapping[str, Tensor]
"""The tensors of a quantised weight by name, each flat: ``[entries]`` of a matrix, ``[E, entries]`` of a stack."""


class Part(NamedTuple):
    """A tensor of a format: so many entries of a dtype for every so many weights, in the order of the rows."""

    dtype: torch.dtype
    weights: int
    entries: int = 1

    def size(self, num_weights: int) -> int:
        return -(-num_weights // self.weights) * self.entries


class Layout(NamedTuple):
    """How kernels read the parts of a format: QuantizedWeightParams of csrc/include/moekernels/params.h."""

    codes: Tensor
    scales: Tensor
    order: str
    """Of codes: ``"pairs"`` (first weight in the high nibble), ``"halves"`` (16 low nibbles, then 16 high ones),
    ``"bytes"``."""
    group: int
    """Weights of a row that share a scale: the whole row, or a power of 2 from 32 on."""
    tables: list[Tensor] = []  # noqa: RUF012
    """The 16 values of 4-bit codes, where they are not ``code - 8``; for nested scales also the map of their codes, a
    factor and an offset for every 256 of them."""
    unit: float = 1.0
    """What every scale is multiplied with."""
    int8_rows: bool = False
    """Whether what it is multiplied with is rounded to 8 bits."""
    int8_threshold: float = 0.0
    """The magnitude from which on elements of that are not rounded; 0: there is none."""


@dataclasses.dataclass(frozen=True)
class Format(ABC):
    """How one matrix is stored. Fields are options, which :meth:`__post_init__` checks."""

    name: ClassVar[str]
    group: ClassVar[int] = 1
    """How many weights of a row are stored together: K must be a multiple."""

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, as :func:`parse_format` takes them, without those that are None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def columns_per_group(self) -> int:
        return self.group

    @abstractmethod
    def parts(self, columns: int) -> dict[str, Part]:
        """The tensors that a matrix of so many columns consists of; the codes first."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight ``[N, K]`` in float32, bfloat16 or float16."""

    @abstractmethod
    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        """The weight ``[N, K]`` in float32."""

    def layout(self, parts: Parts, columns: int) -> Layout | None:
        """How kernels read a weight of so many columns; None: it is dequantised first."""
        return None

    def apart(self, parts: Parts) -> tuple[Format, dict[str, Tensor]]:
        """The same values, with codes and scales in tensors of their own, where a format has both in one."""
        return self, dict(parts)

    def check_shape(self, shape: Sequence[int], where: str) -> None:
        """Refuse what is no matrix or stack of them, or whose rows do not divide into groups.

        Raises:
            ValueError: naming `where`.
        """
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"{where}: weight must be [N, K] or [E, N, K] and not empty, got {list(shape)}")
        if shape[-1] % self.columns_per_group:
            raise ValueError(
                f"{where}: the last dimension of weight must be a multiple of {self.columns_per_group}, the group of "
                f"{self.name}, got {shape[-1]} (shape {list(shape)})"
            )

    def check_parts(self, parts: Parts, shape: Sequence[int], where: str) -> None:
        """Refuse parts that are not those of a weight of this shape.

        Raises:
            ValueError: naming `where` and the part.
        """
        self.check_shape(shape, where)
        specs = self.parts(shape[-1])
        if set(parts) != set(specs):
            raise ValueError(f"{where}: {self.name} has the parts {', '.join(specs)}; got {', '.join(parts)}")
        device = next(iter(parts.values())).device
        for name, spec in specs.items():
            expected = [*shape[:-2], spec.size(shape[-2] * shape[-1])]
            part = parts[name]
            if list(part.shape) != expected or part.dtype != spec.dtype:
                raise ValueError(
                    f"{where}: {name} of a {self.name} weight {list(shape)} must be {spec.dtype} {expected}, "
                    f"got {part.dtype} {list(part.shape)}"
                )
            if part.device != device:
                raise ValueError(f"{where}: {name} must be on {device} like the other parts, got {part.device}")

    def rows(self, parts: Parts, columns: int, begin: int, end: int) -> dict[str, Tensor]:
        """The parts of some rows, as views.

        Raises:
            ValueError: something that is stored once covers rows on both sides of an end.
        """
        last = next(iter(parts.values())).shape[-1]
        views = {}
        for name, part in self.parts(columns).items():
            entries = part.entries
            total = last if name == next(iter(parts)) else parts[name].shape[-1]
            bounds = []
            for row in (begin, end):
                whole, rest = divmod(row * columns, part.weights)
                bounds.append(whole * entries + (entries if rest else 0))
                if rest and bounds[-1] != total:
                    raise ValueError(
                        f"{self.name}: rows {begin} to {end} cannot be had by themselves: {part.weights} weights "
                        f"share their {name}, and a row has {columns}"
                    )
            views[name] = parts[name][..., bounds[0] : bounds[1]]
        return views

    def rows_are_apart(self, columns: int) -> bool:
        """Whether nothing that is stored once covers weights of two rows of so many columns."""
        return all(columns % part.weights == 0 for part in self.parts(columns).values())

    def take(self, parts: Parts, columns: int, rows: Tensor) -> dict[str, Tensor]:
        """Copies of the parts of some rows of a matrix, in the order of the vector `rows`.

        Raises:
            ValueError: rows are not apart.
            IndexError: there is no such row.
        """
        if not self.rows_are_apart(columns):
            raise ValueError(f"{self.name}: rows of {columns} weights share their scales, and cannot be taken")
        sizes = {name: part.size(columns) for name, part in self.parts(columns).items()}
        return {name: parts[name].view(-1, size).index_select(0, rows).view(-1) for name, size in sizes.items()}

    def join(self, pieces: Sequence[Parts], columns: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """The parts of matrices (or stacks) one below the other.

        Raises:
            ValueError: something that is stored once would cover rows of two of them.
        """
        for name, part in self.parts(columns).items():
            for count in rows[:-1]:
                if count * columns % part.weights:
                    raise ValueError(
                        f"{self.name}: cannot join matrices of {count} rows of {columns}: {part.weights} weights share "
                        f"their {name}"
                    )
        return {name: torch.cat([piece[name] for piece in pieces], dim=-1) for name in self.parts(columns)}


def check_activations(format: str, activations: str | None) -> None:
    """Refuse what is neither None nor ``"int8"``.

    Raises:
        ValueError: naming the format.
    """
    if activations not in (None, "int8"):
        raise ValueError(f"{format}: activations must be 'int8' or None, got {activations!r}")


FORMATS: dict[str, Callable[..., Format]] = {}
"""What makes each format of its options. Filled by the modules of this package."""


def parse_format(format: str | Format, where: str = "quantize", **options: Any) -> Format:
    """The format of a name and options.

    Raises:
        ValueError: there is no such format, it has no such option, or an option has a wrong value.
    """
    if isinstance(format, Format):
        if options:
            raise ValueError(f"{where}: options ({', '.join(options)}) go with the name of a format, not with {format}")
        return format
    if format not in FORMATS:
        raise ValueError(f"{where}: format must be one of {', '.join(FORMATS)}; got {format!r}")
    make = FORMATS[format]
    known = [field.name for field in dataclasses.fields(make)] if isinstance(make, type) else []
    for name in options:
        if name not in known:
            raise ValueError(f"{where}: {format} has {_options(known)}; got {name!r}")
    return make(**options)


def _options(names: list[str]) -> str:
    return f"the options {', '.join(names)}" if names else "no options"
