"""Blocks of GGUF files, kept as they lie there: ``q4_0``, ``q8_0``, ``q4_k``, ``q6_k``.

A block holds 32 or 256 weights of a row and their scales. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moekernels.quantization.formats import FORMATS, Format, Part, Parts
from moekernels.quantization.groups import (
    Int4,
    Int8Groups,
    pack_nibbles,
    round_to_bytes,
    round_to_nibbles,
    unpack_nibbles,
)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of every block, ``[B, 1]`` in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bytes(scales: Tensor) -> Tensor:
    return scales.half().unsqueeze(-1).view(torch.uint8)


def _scales_and_codes(blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of blocks that hold a scale and then codes, in any number of leading dimensions."""
    blocks = blocks.unflatten(-1, (-1, size))
    return blocks[..., :2].contiguous().view(torch.float16).flatten(-2), blocks[..., 2:].flatten(-2)


@dataclass(frozen=True)
class _Blocks(Format):
    """Blocks of a GGUF file. Parts: ``blocks``, uint8, the file's bytes."""

    bytes_per_block: ClassVar[int]

    def parts(self, columns: int) -> dict[str, Part]:
        return {"blocks": Part(torch.uint8, self.group, self.bytes_per_block)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"blocks": self.to_blocks(weight.float().view(-1, self.group)).view(-1)}

    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        return self.from_blocks(parts["blocks"].reshape(-1, self.bytes_per_block)).view(rows, columns)

    def to_blocks(self, weight: Tensor) -> Tensor:
        """float32 ``[B, group]`` to uint8 ``[B, bytes_per_block]``."""
        raise ValueError(f"quantize: weights cannot be quantised to {self.name}, only read from GGUF files")

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 ``[B, bytes_per_block]`` to float32 ``[B, group]``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Q4_0(_Blocks):
    name: ClassVar[str] = "q4_0"
    group: ClassVar[int] = 32
    bytes_per_block: ClassVar[int] = 18
    __doc__ = _Blocks.__doc__

    def to_blocks(self, weight: Tensor) -> Tensor:
        codes, scales = round_to_nibbles(weight)
        return torch.cat([_bytes(scales), pack_nibbles(codes)], dim=-1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        return _float16(blocks, 0) * (unpack_nibbles(blocks[:, 2:]).float() - 8)

    def apart(self, parts: Parts) -> tuple[Format, dict[str, Tensor]]:
        scales, codes = _scales_and_codes(parts["blocks"], self.bytes_per_block)
        return Int4(), {"codes": codes, "scales": scales}


@dataclass(frozen=True)
class Q8_0(_Blocks):
    name: ClassVar[str] = "q8_0"
    group: ClassVar[int] = 32
    bytes_per_block: ClassVar[int] = 34
    __doc__ = _Blocks.__doc__

    def to_blocks(self, weight: Tensor) -> Tensor:
        codes, scales = round_to_bytes(weight)
        return torch.cat([_bytes(scales), codes.view(torch.uint8)], dim=-1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        return blocks[:, 2:].contiguous().view(torch.int8).float() * _float16(blocks, 0)

    def apart(self, parts: Parts) -> tuple[Format, dict[str, Tensor]]:
        scales, codes = _scales_and_codes(parts["blocks"], self.bytes_per_block)
        return Int8Groups(), {"codes": codes.view(torch.int8), "scales": scales}


@dataclass(frozen=True)
class Q4_K(_Blocks):
    """Blocks of a GGUF file: 8 groups of 32, ``w = code * d * scale - dmin * minimum`` with 6-bit scales and minima."""

    name: ClassVar[str] = "q4_k"
    group: ClassVar[int] = 256
    bytes_per_block: ClassVar[int] = 144

    def from_blocks(self, blocks: Tensor) -> Tensor:
        # The 6 bits of the last four groups are spread over all three runs of bytes.
        first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
        scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], dim=-1)
        minima = torch.cat([second & 63, third >> 4 | second >> 2 & 48], dim=-1)
        codes = blocks[:, 16:].view(-1, 4, 1, 32)
        codes = torch.cat([codes & 15, codes >> 4], dim=2).view(-1, 8, 32)
        step = (_float16(blocks, 0) * scales.float()).unsqueeze(-1)
        minimum = (_float16(blocks, 2) * minima.float()).unsqueeze(-1)
        return (step * codes.float() - minimum).view(-1, self.group)


@dataclass(frozen=True)
class Q6_K(_Blocks):
    """Blocks of a GGUF file: 16 groups of 16, ``w = (code - 32) * d * scale`` with 8-bit scales."""

    name: ClassVar[str] = "q6_k"
    group: ClassVar[int] = 256
    bytes_per_block: ClassVar[int] = 210

    def from_blocks(self, blocks: Tensor) -> Tensor:
        low = blocks[:, :128].view(-1, 2, 1, 64)
        low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 8, 32)
        high = blocks[:, 128:192].view(-1, 2, 1, 32)
        high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 32)
        codes = (low | high << 4).float() - 32
        scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
        step = (_float16(blocks, 208) * scales).unsqueeze(-1)
        return (step * codes.view(-1, 16, 16)).view(-1, self.group)


FORMATS.update(q4_0=Q4_0, q8_0=Q8_0, q4_k=Q4_K, q6_k=Q6_K)
