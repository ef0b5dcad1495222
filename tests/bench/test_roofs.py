from __future__ import annotations

import pytest
import torch

from moekernels.bench.roofs import Roofs, measure_roofs


def test_roofs_are_positive(cpu: torch.device) -> None:
    roofs = measure_roofs(cpu, [torch.float32, torch.bfloat16], 0.001, buffer_bytes=1 << 16, matmul_size=16)
    assert roofs.read_bandwidth > 0 and roofs.copy_bandwidth > 0
    assert roofs.matmul.keys() == {"float32", "bfloat16"} and all(rate > 0 for rate in roofs.matmul.values())


def test_the_nearer_roof() -> None:
    roofs = Roofs(10.0, 20.0, {"float32": 100.0})
    assert roofs.seconds(1000.0, 20.0, torch.float32) == 10.0
    assert roofs.seconds(1000.0, 400.0, torch.float32) == 20.0
    assert roofs.seconds(0.0, 10.0, torch.float16) == 0.5  # no product, so no rate of it is needed
    assert str(roofs) == "read 0.0 GB/s, copy 0.0 GB/s; matmul float32 0 GFLOP/s"


@pytest.mark.parametrize(
    ("read", "copy", "flops", "num_bytes", "times"),
    [
        (10.0, 20.0, 1000.0, 20.0, 2 * 8**3 / 1000.0),  # products: 10 s, and 1 s of copying
        (10.0, 20.0, 1000.0, 400.0, 2 * 256 / 400.0),  # copying 256 bytes moves 512
        (30.0, 20.0, 0.0, 64.0, 256 / 64.0),  # reading
    ],
)
def test_a_probe_is_bound_by_the_nearer_roof(cpu, read, copy, flops, num_bytes, times) -> None:  # type: ignore[no-untyped-def]
    roofs = Roofs(read, copy, {"float32": 100.0}, probe_bytes=256, matmul_size=8)
    probe = roofs.probe(flops, num_bytes, torch.float32, cpu)
    assert probe.times == times
    assert isinstance(result := probe.run(), torch.Tensor)
    assert result.shape == ((8, 8) if flops == 1000.0 and num_bytes == 20.0 else (64,) if read < copy else ())


@pytest.mark.parametrize(("times", "read"), [((9.0, 4.0, 2.0, 8.0), 2.0)])
def test_a_roof_is_the_best_of_many(stepping, cpu, times, read, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    run = stepping.takes(*times)
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: run())
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: run())
    assert measure_roofs(cpu, [], 1e-9, buffer_bytes=64).read_bandwidth == 64 / read
