"""Clusters in the emulator: multicast copies, barriers in other blocks, and what can go wrong with them."""

from __future__ import annotations

import pytest
import torch

from tests.simt.build import KERNELS
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing, poisoned
from tests.simt.hardware import HardwareLibrary, Machine

TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
BLOCKS, STEPS, ROWS = 4, 5, 16


@pytest.fixture(scope="module")
def cluster(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "cluster.cu")


def _copy(library: SimtLibrary | HardwareLibrary, fault: int = 0, settings: Settings | None = None) -> None:
    values = torch.randn(STEPS, ROWS, 8, 8).half()
    out = poisoned((BLOCKS, STEPS, ROWS, 8, 8), torch.float16)
    library.call("cluster_copy", values, out, BLOCKS, STEPS, fault, settings=settings)
    swizzled = torch.stack([values[:, row, torch.arange(8) ^ (row & 7)] for row in range(ROWS)], dim=1)
    assert torch.equal(out, swizzled.expand(BLOCKS, -1, -1, -1, -1))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(4))
def test_halves_of_a_box_from_each_block(machine: Machine, seed: int, timing: Timing) -> None:
    _copy(machine("cluster.cu"), settings=Settings(seed=seed, timing=timing))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "no mbarrier has been initialised|no barrier after its initialisation"),
        (2, "race"),
        (3, "touched after its threads have exited"),
        (4, "race|deadlock|more arrivals"),
        (5, "the thread has arrived already"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_faults_are_found(cluster: SimtLibrary, seed: int, fault: int, message: str) -> None:
    with pytest.raises(SimtError, match=message):
        _copy(cluster, fault, Settings(seed=seed, timing="eager" if seed == 0 else "random"))


def test_launches_that_cannot_be_are_errors(cluster: SimtLibrary) -> None:
    values = torch.zeros(ROWS, 64).half()
    out = poisoned((3, ROWS, 64), torch.float16)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):  # blocks that make no whole clusters
        cluster.call("cluster_copy", values, out, 3, 1, 0)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        cluster.call("cluster_copy", values, out, 2, 1, 0, settings=Settings(compute_capability=89))
