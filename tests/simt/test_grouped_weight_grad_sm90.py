"""The Hopper weight gradient: wgmma on MN-major operands, TMA, cp.async and mbarriers, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.simt.build import CUDA_SOURCES, REPOSITORY, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing
from tests.simt.weight_grad_problems import Tiles, WeightGradProblem, check, launch, make_inputs

CONFIG = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_weight_grad_config.cu"
NARROW, WIDE = Tiles(2, 128, 128, 6), Tiles(2, 128, 256, 4)
RAGGED = (130, 0, 1, 37, 0, 64)
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
GATHERED = pytest.mark.parametrize(
    ("grad_gathered", "gathered"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["in-order", "rows-gathered", "grad-gathered", "both-gathered"],
)
TILES = pytest.mark.parametrize("tiles", [NARROW, WIDE], ids=["narrow", "wide"])


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    sources = sorted(s for s in (CUDA_SOURCES / "weight_grad").glob("*.cu") if s.name != "grouped_weight_grad.cu")
    return simt.library(CONFIG, *sources, *instances("grouped_weight_grad_"))


@TILES
@GATHERED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_instantiation(
    library: SimtLibrary, dtype: torch.dtype, grad_gathered: bool, gathered: bool, tiles: Tiles
) -> None:
    check(library, WeightGradProblem(RAGGED, 200, 264, gathered, grad_gathered, dtype=dtype), tiles)
    assert len(library.launches) == 1
    assert "grouped_weight_grad_sm90_kernel" in library.launches[0]


# Rows that begin on 16 bytes; widths that are not multiples of 8 are stored one element at a time.
@pytest.mark.parametrize(
    ("out_features", "in_features", "padding"),
    [(1, 1, 7), (37, 29, 3), (129, 65, 7), (63, 127, 1), (64, 64, 0), (128, 128, 8), (9, 257, 7), (16, 264, 0)],
)
@TILES
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_sizes(
    library: SimtLibrary, gathered: bool, tiles: Tiles, out_features: int, in_features: int, padding: int
) -> None:
    p = WeightGradProblem((5, 0, 66), out_features, in_features, padding=padding)
    check(library, replace(p, gathered=gathered, grad_gathered=gathered), tiles)
    assert "grouped_weight_grad_sm90_kernel" in library.launches[0]


@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (1, 0, 0), (0, 0, 300), (1,) * 20, (15, 16, 17), (63, 64, 65), (127, 128, 129)], ids=str
)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_routings(library: SimtLibrary, gathered: bool, counts: tuple[int, ...]) -> None:
    grad_weight = check(library, WeightGradProblem(counts, 24, 16, gathered=gathered), NARROW)
    for count, gradient in zip(counts, grad_weight, strict=True):
        assert count > 0 or torch.equal(gradient, torch.zeros(24, 16).bfloat16())


@pytest.mark.parametrize("shape", [(24, 16), (21, 13)], ids=["aligned", "odd"])
def test_zeros_reach_every_element(library: SimtLibrary, shape: tuple[int, int]) -> None:
    for tiles in (NARROW, WIDE):
        p = WeightGradProblem((0, 9, 0), 128 + shape[0], 256 + shape[1], padding=0 if shape[1] == 16 else 3)
        grad_weight = check(library, p, tiles)
        assert torch.equal(grad_weight[0], torch.zeros_like(grad_weight[0]))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(3))
@GATHERED
def test_orders_of_execution(
    library: SimtLibrary, grad_gathered: bool, gathered: bool, seed: int, timing: Timing
) -> None:
    # Two blocks take several tiles each; the ring of stages wraps within tiles and across them.
    settings = Settings(seed=seed, timing=timing, sm_count=2)
    p = WeightGradProblem((330, 0, 3, 90), 136, 136, gathered, grad_gathered)
    check(library, p, (NARROW, WIDE)[seed % 2], settings, seed=seed)


def test_neither_schedule_nor_tile_width_changes_a_bit(library: SimtLibrary) -> None:
    p = WeightGradProblem((150, 2, 70), 200, 264, gathered=True)
    expected = check(library, p, NARROW)
    for tiles, sm_count in ((NARROW, 1), (WIDE, 1), (WIDE, 5), (NARROW, 64)):
        assert torch.equal(launch(library, p, make_inputs(p), tiles, Settings(sm_count=sm_count))[0], expected)


def test_gathering_does_not_change_a_bit(library: SimtLibrary) -> None:
    p = WeightGradProblem((150, 2, 70), 72, 64, gathered=True, grad_gathered=True)
    inputs = make_inputs(p)
    expected, _ = launch(library, p, inputs, NARROW)

    def ordered(source: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        assert tokens is not None
        rows = source[tokens.long().clamp(0, source.shape[0] - 1)].clone()
        rows[(tokens < 0) | (tokens >= source.shape[0])] = 0
        return rows

    in_order = replace(
        inputs,
        grad_rows=ordered(inputs.grad_rows, inputs.grad_token_of_row),
        rows=ordered(inputs.rows, inputs.token_of_row),
        grad_token_of_row=None,
        token_of_row=None,
    )
    assert torch.equal(launch(library, p, in_order, NARROW)[0], expected)


def test_no_source_rows_at_all(library: SimtLibrary) -> None:
    p = WeightGradProblem((3, 4), 24, 16, gathered=True)
    inputs = make_inputs(p)
    inputs.rows = inputs.rows[:0]
    grad_weight, _ = launch(library, p, inputs, NARROW)
    assert torch.equal(grad_weight, torch.zeros(2, 24, 16).bfloat16())


@pytest.mark.parametrize("changed", [{"padding": 3}, {"shift": 1}], ids=str)
def test_what_tma_cannot_serve_goes_elsewhere(library: SimtLibrary, changed: dict[str, int]) -> None:
    check(library, replace(WeightGradProblem((5, 6), 64, 64), **changed), NARROW)
    assert "grouped_weight_grad_sm80_kernel" in library.launches[0]


@pytest.mark.parametrize("tiles", [Tiles(2, 128, 64, 6), Tiles(2, 64, 128, 6), Tiles(2, 128, 128, 4)], ids=str)
def test_tiles_that_nobody_built_are_an_error(library: SimtLibrary, tiles: Tiles) -> None:
    p = WeightGradProblem((5, 6), 64, 64)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), tiles)


@pytest.mark.parametrize("smem_offset", [16, 512])
def test_shared_memory_may_start_anywhere(library: SimtLibrary, smem_offset: int) -> None:
    check(library, WeightGradProblem((70, 5), 40, 72, gathered=True), NARROW, Settings(smem_offset=smem_offset))
