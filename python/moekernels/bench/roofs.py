"""What a machine can do at most, measured in the run whose figures it is compared with.

:func:`measure_roofs` finds the ceilings once, for a heading and for which of them is nearer. What share of it a kernel
reaches is then measured in turns with it, by a :class:`Probe`: memory that others use is faster at one moment than at
another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekernels.bench.clocks import Run, interleaved_times


@dataclass
class Roofs:
    """The ceilings of a kernel: bytes it can move and products it can sum."""

    read_bandwidth: float  # bytes/s, reading a buffer far larger than any cache
    copy_bandwidth: float  # bytes/s, read and written, copying such a buffer
    matmul: dict[str, float]  # dtype -> FLOP/s of a large square matmul
    probe_bytes: int = 1 << 28  # of the buffer that a probe reads
    matmul_size: int = 2048  # rows of the matrices that a probe multiplies

    @property
    def bandwidth(self) -> float:
        """Bytes/s, the better of both."""
        return max(self.read_bandwidth, self.copy_bandwidth)

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The least time for that much work."""
        return max(flops / self.matmul[name_of(dtype)] if flops else 0.0, num_bytes / self.bandwidth)

    def probe(self, flops: float, num_bytes: float, dtype: torch.dtype, device: torch.device) -> Probe:
        """What reaches the roof that is the nearer one for that much work."""
        products = flops / self.matmul[name_of(dtype)] if flops else 0.0
        if products > num_bytes / self.bandwidth:
            return Probe(_probing(_matmul, device, dtype, self.matmul_size), 2 * self.matmul_size**3 / flops)
        if self.read_bandwidth >= self.copy_bandwidth:
            return Probe(_probing(_read, device, self.probe_bytes), self.probe_bytes / num_bytes)
        return Probe(_probing(_copy, device, self.probe_bytes), 2 * self.probe_bytes / num_bytes)

    def __str__(self) -> str:
        matmul = (f"{name} {flops / 1e9:,.0f} GFLOP/s" for name, flops in self.matmul.items())
        return (
            f"read {self.read_bandwidth / 1e9:,.1f} GB/s, copy {self.copy_bandwidth / 1e9:,.1f} GB/s; matmul "
            + ", ".join(matmul)
        )


@dataclass
class Probe:
    """Work that is bound by a roof, to be timed in turns with a kernel.

    Attributes:
        run: does it.
        times: how many times the kernel's work that is.
    """

    run: Run
    times: float


def measure_roofs(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    budget: float = 1.0,
    buffer_bytes: int = 1 << 30,
    matmul_size: int | None = None,
) -> Roofs:
    """Bandwidth by summing and copying a buffer, and a square matmul of random values per dtype, each at its best.

    Args:
        budget: seconds for each of both, and for each dtype.
        buffer_bytes: of the buffer; it should be far larger than any cache.
        matmul_size: 2048 on a CPU and 8192 on a GPU if not given.
    """
    runs = {"read": _read(device, buffer_bytes), "copy": _copy(device, buffer_bytes)}
    bandwidths = interleaved_times(runs, device, 1.5 * budget)
    size = matmul_size or (2048 if device.type == "cpu" else 8192)
    matmul = {
        name_of(dtype): 2 * size**3 / min(interleaved_times({"": _matmul(device, dtype, size)}, device, budget)[""])
        for dtype in dtypes
    }
    read, copy = buffer_bytes / min(bandwidths["read"]), 2 * buffer_bytes / min(bandwidths["copy"])
    return Roofs(read, copy, matmul, min(buffer_bytes, Roofs.probe_bytes), size)


def reading(num_bytes: int, device: torch.device) -> Probe:
    """Reads memory, as much as that or a part of it."""
    probed = min(num_bytes, Roofs.probe_bytes)
    return Probe(_probing(_read, device, probed), probed / num_bytes)


@functools.lru_cache(maxsize=2)
def _probing(make: Callable[..., Run], *arguments: Any) -> Run:
    """One for all the kernels of a sweep: its buffers are large."""
    return make(*arguments)


def _read(device: torch.device, num_bytes: int) -> Run:
    return _buffer(device, num_bytes).sum


def _copy(device: torch.device, num_bytes: int) -> Run:
    buffer = _buffer(device, num_bytes)
    target = torch.empty_like(buffer)
    return lambda: target.copy_(buffer)


def _matmul(device: torch.device, dtype: torch.dtype, size: int) -> Run:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _buffer(device: torch.device, num_bytes: int) -> torch.Tensor:
    return torch.ones(num_bytes // 4, device=device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
