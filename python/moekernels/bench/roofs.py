"""What a machine can do at most, measured in the run whose figures it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moekernels.bench.clocks import interleaved_times


@dataclass
class Roofs:
    """The ceilings of a kernel: bytes it can move and products it can sum."""

    read_bandwidth: float  # bytes/s, reading a buffer far larger than any cache
    copy_bandwidth: float  # bytes/s, read and written, copying such a buffer
    matmul: dict[str, float]  # dtype -> FLOP/s of a large square matmul

    @property
    def bandwidth(self) -> float:
        """Bytes/s, the better of both."""
        return max(self.read_bandwidth, self.copy_bandwidth)

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The least time for that much work."""
        return max(flops / self.matmul[name_of(dtype)] if flops else 0.0, num_bytes / self.bandwidth)

    def __str__(self) -> str:
        matmul = (f"{name} {flops / 1e9:,.0f} GFLOP/s" for name, flops in self.matmul.items())
        return (
            f"read {self.read_bandwidth / 1e9:,.1f} GB/s, copy {self.copy_bandwidth / 1e9:,.1f} GB/s; matmul "
            + ", ".join(matmul)
        )


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
    read, copy = _bandwidths(device, 1.5 * budget, buffer_bytes)
    size = matmul_size or (2048 if device.type == "cpu" else 8192)
    return Roofs(read, copy, {name_of(dtype): _matmul_rate(device, dtype, size, budget) for dtype in dtypes})


def _bandwidths(device: torch.device, budget: float, buffer_bytes: int) -> tuple[float, float]:
    buffer = torch.ones(buffer_bytes // 4, device=device)
    target = torch.empty_like(buffer)
    times = interleaved_times({"read": buffer.sum, "copy": lambda: target.copy_(buffer)}, device, budget)
    return 4 * buffer.numel() / min(times["read"]), 8 * buffer.numel() / min(times["copy"])


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int, budget: float) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(interleaved_times({"matmul": lambda: a @ b}, device, budget)["matmul"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
