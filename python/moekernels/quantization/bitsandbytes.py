"""The formats of bitsandbytes, to the bit: ``nf4`` and ``fp4`` in blocks, ``int8`` by rows.

Blocks run over the flat order of a matrix, and the first of two weights is in the high nibble. Sources: QLoRA (arXiv
2305.14314) for NF4 and double quantisation, LLM.int8() (arXiv 2208.07339) for int8, 8-bit optimisers (arXiv 2110.02861)
for the dynamic map; the behaviour at ties, zeros and NaN is that of bitsandbytes 0.50.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moekernels._constants import made_once
from moekernels.quantization.formats import FORMATS, Format, Layout, Part, Parts, check_activations

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The value of each code of NF4: quantiles of a normal distribution."""

_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODES = (*(x / 12 for x in _FP4_MAGNITUDES), *(-x / 12 for x in _FP4_MAGNITUDES))
"""The value of each code of FP4: a sign, two bits of exponent, one of fraction."""

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK, _NESTED_STEPS = 256, 65535
_SMALLEST_DIVISOR = 1e-38
_THRESHOLD = 6.0  # of LLM.int8()
_MOST = torch.finfo(torch.float32).max


@made_once
def _codes(name: str, device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODES if name == "nf4" else FP4_CODES, dtype=torch.float32, device=device)


@made_once
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values, in rising order, in which double quantisation stores scales: as many digits as fit the size."""
    # Whatever the defaults are while this is made.
    cpu, single = torch.device("cpu"), torch.float32
    values = [torch.tensor([0.0], dtype=single, device=cpu), torch.tensor([1.0], dtype=single, device=cpu)]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=single, device=cpu)
        # Each value is rounded once to double and once to float32, as where it was defined.
        scaled = (10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).float()
        values += [scaled, -scaled]
    return torch.cat(values).sort().values.to(device)


def _blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block, and all values divided by that of their block."""
    full = flat.numel() // blocksize * blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=_SMALLEST_DIVISOR)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp(-1, 1)])
    return absmax, scaled


def _times_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    return values * absmax.repeat_interleave(blocksize)[: values.numel()]


@dataclass(frozen=True)
class _FourBit(Format):
    """4-bit codes in blocks.

    Args:
        blocksize: weights that share a scale: 32, 64, ... 4096.
        double_quant: store the scales in 8 bits.

    Parts: ``codes``, uint8, two weights each; ``absmax``, the scale of each block, float32. With `double_quant` absmax
    are uint8 codes of :func:`dynamic_map`, and for every 256 of them there are float32 ``nested_absmax`` and
    ``offset``: ``scale = map[absmax] * nested_absmax + offset``.
    """

    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.blocksize not in _BLOCKSIZES:
            raise ValueError(
                f"{self.name}: blocksize must be one of {', '.join(map(str, _BLOCKSIZES))}; got {self.blocksize!r}"
            )

    def parts(self, columns: int) -> dict[str, Part]:
        codes = {"codes": Part(torch.uint8, 2)}
        if not self.double_quant:
            return {**codes, "absmax": Part(torch.float32, self.blocksize)}
        nested = Part(torch.float32, self.blocksize * _NESTED_BLOCK)
        return {**codes, "absmax": Part(torch.uint8, self.blocksize), "nested_absmax": nested, "offset": nested}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        absmax, scaled = _blocks(weight.reshape(-1).float(), self.blocksize)
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        values, order = torch.sort(_codes(self.name, weight.device), stable=True)
        # Half-way between two codes is the lower one.
        codes = order.to(torch.uint8)[torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)]
        parts = {"codes": codes[::2] << 4 | codes[1::2]}
        return {**parts, **(self._nest(absmax) if self.double_quant else {"absmax": absmax})}

    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        codes = parts["codes"]
        indices = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)[: rows * columns]
        values = _codes(self.name, codes.device)[indices.int()]
        return _times_blocks(values, self.scales(parts), self.blocksize).view(rows, columns)

    def layout(self, parts: Parts, columns: int) -> Layout | None:
        if columns % self.blocksize:  # blocks would run over the ends of rows
            return None
        tables = [_codes(self.name, parts["codes"].device)]
        if self.double_quant:
            tables += [dynamic_map(parts["codes"].device), parts["nested_absmax"], parts["offset"]]
        return Layout(parts["codes"], parts["absmax"], "pairs", self.blocksize, tables)

    def scales(self, parts: Parts) -> Tensor:
        """The float32 scale of every block."""
        if not self.double_quant:
            return parts["absmax"]
        absmax, nested, offset = parts["absmax"], parts["nested_absmax"], parts["offset"]
        values = _times_blocks(dynamic_map(absmax.device)[absmax.int()], nested, _NESTED_BLOCK)
        return values + offset.repeat_interleave(_NESTED_BLOCK)[: values.numel()]

    def _nest(self, absmax: Tensor) -> dict[str, Tensor]:
        offset = absmax.mean()
        centred = absmax - offset
        blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
        nested = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(dim=-1)
        scaled = (blocks * (1.0 / nested).unsqueeze(1)).view(-1)[: absmax.numel()]
        # The nearest value, not of the scale itself but of one of 65536 evenly spaced ones; the first where it is NaN.
        place = ((scaled.clamp(-1, 1) + 1) * (_NESTED_STEPS / 2) + 0.5).nan_to_num(0.0).int()
        values = dynamic_map(absmax.device)
        nearest = torch.bucketize(place * (2 / _NESTED_STEPS) - 1, (values[:-1] + values[1:]) / 2)
        return {
            "absmax": nearest.to(torch.uint8),
            "nested_absmax": nested,
            "offset": offset.expand(nested.shape).clone(),
        }


@dataclass(frozen=True)
class NF4(_FourBit):
    name: ClassVar[str] = "nf4"
    __doc__ = _FourBit.__doc__


@dataclass(frozen=True)
class FP4(_FourBit):
    name: ClassVar[str] = "fp4"
    __doc__ = _FourBit.__doc__


@dataclass(frozen=True)
class Int8(Format):
    """8-bit integers, a scale for each row: ``w = codes * SCB / 127``.

    Args:
        activations: ``"int8"``: rows that it is multiplied with are rounded to 8 bits, each with a scale of its own, as
            :func:`moekernels.ops.reference.round_rows` says; None: they stay as they are.
        threshold: beside `activations`: elements of a row of this magnitude and more are not rounded, and do not count
            for its scale; they are multiplied with the dequantised weights. 6 by default, 0 rounds all.

    Parts: ``codes``, int8; ``SCB``, the largest magnitude of each row in float16's precision, float32.
    """

    name: ClassVar[str] = "int8"
    activations: str | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_activations(self.name, self.activations)
        if self.activations is None:
            if self.threshold is not None:
                raise ValueError(f"int8: threshold goes with activations='int8', got {self.threshold!r}")
            return
        threshold = _THRESHOLD if self.threshold is None else self.threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= _MOST:
            raise ValueError(f"int8: threshold must be 0 or a positive number, got {threshold!r}")
        object.__setattr__(self, "threshold", float(torch.tensor(threshold, dtype=torch.float32)))

    def parts(self, columns: int) -> dict[str, Part]:
        return {"codes": Part(torch.int8, 1), "SCB": Part(torch.float32, columns)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        rounded = weight.half().float()
        absmax = rounded.abs().amax(dim=-1)
        codes = (rounded * (127.0 / absmax).unsqueeze(-1)).round()
        # A row of zeros, and one with a NaN or an infinity, which its scale keeps.
        return {"codes": codes.nan_to_num(0.0).to(torch.int8).view(-1), "SCB": absmax}

    def dequantize(self, parts: Parts, rows: int, columns: int) -> Tensor:
        return parts["codes"].view(rows, columns) * parts["SCB"].unsqueeze(-1) * (1 / 127)

    def layout(self, parts: Parts, columns: int) -> Layout:
        return Layout(
            parts["codes"], parts["SCB"], "bytes", columns, unit=1 / 127,
            int8_rows=self.activations is not None, int8_threshold=self.threshold or 0.0,
        )  # fmt: skip


FORMATS.update(nf4=NF4, fp4=FP4, int8=Int8)
