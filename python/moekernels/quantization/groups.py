"""``int4`` and ``int8_groups``: signed integers in small groups of a row, which take the least work to multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moekernels.quantization.formats import FORMATS, Format, Layout, Part, Parts, check_activations

_BLOCK = 32
"""Codes that lie together: byte i of 16 holds weight i in its low nibble and weight 16 + i in its high one."""


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 ``[..., 32]`` to ``[..., 16]``."""
    return codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 ``[..., 16]`` to ``[..., 32]``."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def round_to_nibbles(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The codes 0 to 15 of groups ``[..., G]``, uint8, and their scales ``[...]``: ``w = (code - 8) * scale``.

    The scale is signed and gives the largest weight code 0, so that all of -8 ... 7 is used: the rule of llama.cpp's
    Q4_0, which has no zero point. A group with a NaN reads back as NaN; one with an infinity too, but for the infinity.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (groups * inverse + 8.5).nan_to_num(0.0).trunc().clamp(0, 15).to(torch.uint8)
    return codes, scale.squeeze(-1)


def round_to_bytes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of groups ``[..., G]``, int8, and their scales ``[...]``: ``w = code * scale``, as llama.cpp's Q8_0."""
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    scaled = groups * torch.where(scale == 0, 0.0, 1 / scale)
    # Half-way is rounded away from zero.
    floor = scaled.abs().floor()
    codes = scaled.sign() * (floor + (2 * (scaled.abs() - floor)).floor())
    return codes.nan_to_num(0.0).to(torch.int8), scale.squeeze(-1)


@dataclass(frozen=True)
class Int4(Format):
    """Signed 4-bit integers in groups of a row: ``w = (code - 8) * scale``. With groups of 32 the values of Q4_0.

    Args:
        group_size: weights that share a scale, 32 or 64.
        activations: ``"int8"``: rows that it is multiplied with are rounded to 8 bits, each with a scale of its own, as
            :func:`moekernels.ops.reference.round_rows` says; None: they stay as they are.

    Parts: ``codes``, uint8, in blocks of 32 weights (low nibbles first); ``scales``, float16.
    """

    name: ClassVar[str] = "int4"
    group_size: int = 32
    activations: str | None = None

    def __post_init__(self) -> None:
        check_activations(self.name, self.activations)
        if self.group_size not in (32, 64):
            raise ValueError(f"int4: group_size must be 32 or 64, got {self.group_size!r}")

    @property
    def columns_per_group(self) -> int:
        return self.group_size

    def parts(self, columns: int) -> dict[str, Part]:
        return {"codes": Part(torch.uint8, 2), "scales": Part(torch.float16, self.group_size)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = round_to_nibbles(weight.float().view(-1, self.group_size))
        return {"codes": pack_nibbles(codes.view(-1, _BLOCK)).view(-1), "scales": scales.half()}

    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        codes = unpack_nibbles(parts["codes"].reshape(-1, _BLOCK // 2)).view(-1, self.group_size)
        return ((codes.float() - 8) * parts["scales"].float().unsqueeze(-1)).view(rows, columns)

    def layout(self, parts: Parts, columns: int) -> Layout:
        int8_rows = self.activations is not None
        return Layout(parts["codes"], parts["scales"], "halves", self.group_size, int8_rows=int8_rows)


@dataclass(frozen=True)
class Int8Groups(Format):
    """Signed 8-bit integers in groups of 32 of a row: ``w = code * scale``, the rule of Q8_0.

    Args:
        activations: as of :class:`Int4`.

    Parts: ``codes``, int8; ``scales``, float16.
    """

    name: ClassVar[str] = "int8_groups"
    group: ClassVar[int] = _BLOCK
    activations: str | None = None

    def __post_init__(self) -> None:
        check_activations(self.name, self.activations)

    def parts(self, columns: int) -> dict[str, Part]:
        return {"codes": Part(torch.int8, 1), "scales": Part(torch.float16, self.group)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = round_to_bytes(weight.float().view(-1, self.group))
        return {"codes": codes.view(-1), "scales": scales.half()}

    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        codes = parts["codes"].reshape(-1, self.group).float()
        return (codes * parts["scales"].float().unsqueeze(-1)).view(rows, columns)

    def layout(self, parts: Parts, columns: int) -> Layout:
        int8_rows = self.activations is not None
        return Layout(parts["codes"], parts["scales"], "bytes", self.group, int8_rows=int8_rows)


FORMATS.update(int4=Int4, int8_groups=Int8Groups)
