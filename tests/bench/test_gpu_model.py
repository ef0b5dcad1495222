"""The model of the CUDA kernels: its arithmetic, and that the documentation shows what it says today."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from moekernels.bench.shapes import OLMOE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_model")


def test_the_documentation_has_its_table(model: ModuleType) -> None:
    assert model.table() in (ROOT / "docs" / "performance.md").read_text()


def test_a_tile_by_hand(model: ModuleType) -> None:
    """128 rows by 256 weights by 64: 1024 clocks of multiplying; 48 KB through the cache, or 32 in a pair."""
    per_clock = 5120 / 132
    alone, paired, narrow = (model.Tile(128, *rest) for rest in ((256, 64), (256, 64, True), (128, 64)))
    assert model.multiply_clocks(alone) == 2 * model.multiply_clocks(narrow) == 1024
    assert model.copy_clocks(alone) == pytest.approx(48 * 1024 / per_clock)
    assert model.copy_clocks(paired) == 1024  # 48 KB written and 16 + 64 KB read, at 128 bytes a clock
    assert model.copy_clocks(narrow) == pytest.approx(32 * 1024 / per_clock)
    assert model.tile_clocks(paired, 2000, 2600) == 32 * 1024 + 2600
    assert model.tile_clocks(model.Tile(128, 256, 64, True, True), 2000, 2600) == 32 * 1024
    assert model.tile_clocks(alone, 2048, 2600) == 32 * model.copy_clocks(alone)  # the cache has no pause


def test_few_tokens_by_hand(model: ModuleType) -> None:
    """One token touches 8 experts of 3 · 2048 · 1024 weights, read at 90 % of 4.8 TB/s."""
    read = 8 * 3 * 2048 * 1024 * 2 / (0.9 * 4.8e12)
    assert model.few_tokens(OLMOE, 1) == pytest.approx(read + 3 * model.LAUNCH)


def test_codes_of_many_rows_by_hand(model: ModuleType) -> None:
    """64 tiles of 128 rows by 8 of 128 columns are 4 rounds of 132; a step of 32 columns is 256 clocks of wgmma."""
    clocks = {"int4": 256 / 0.6, "nf4": 435, "int8": 450}  # of nf4 and int8 the instructions that widen
    for format, step in clocks.items():
        expected = 4 * 64 * step / (0.8 * 1.83e9)
        assert model.quantized_gemm(64 * 100, 64, 1024, 2048, format) == pytest.approx(expected + model.LAUNCH)


def test_work_counts_as_everywhere(model: ModuleType) -> None:
    assert model.flops(OLMOE, 10) == 6 * 10 * 8 * 2048 * 1024
