"""The float32 grouped GEMM on the CUDA cores, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.simt.build import REPOSITORY, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing
from tests.simt.gemm_problems import Problem, Tiles, check, launch, make_inputs

PATH = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_gemm_path.cu"
SMALL = Tiles(64, 4)
LARGE = Tiles(128, 3)
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
RAGGED = (130, 0, 1, 37, 0, 64)


def problem(counts: tuple[int, ...], out_features: int, in_features: int, **options: Any) -> Problem:
    return replace(Problem(counts, out_features, in_features, dtype=torch.float32), **options)


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library(PATH, "gemm/grouped_gemm_f32.cu", *instances("grouped_gemm_f32_"), defines=("PATH=f32",))


@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_every_instantiation(library: SimtLibrary, gathered: bool, gated: bool, tiles: Tiles) -> None:
    p = problem(RAGGED, 2 * 84, 76, gated=gated, gathered=gathered, bias=True, activation="gelu", unused=3)
    check(library, p, tiles)
    assert len(library.launches) == 1
    assert "grouped_gemm_f32_kernel" in library.launches[0]


@pytest.mark.parametrize(("in_features", "padding", "shift"), [(32, 0, 1), (37, 0, 0), (32, 3, 0), (1, 0, 2)])
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_rows_that_are_not_aligned(
    library: SimtLibrary, gathered: bool, in_features: int, padding: int, shift: int
) -> None:
    check(library, problem((5, 0, 66), 45, in_features, gathered=gathered, padding=padding, shift=shift), SMALL)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (64,), (65,), (0, 0, 150), (1,) * 40], ids=str)
def test_routings(library: SimtLibrary, counts: tuple[int, ...]) -> None:
    check(library, problem(counts, 72, 32, gathered=True, unused=5), SMALL)


@pytest.mark.parametrize("in_features", [0, 1, 15, 16, 17, 48, 128])
@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=str)
def test_depths(library: SimtLibrary, tiles: Tiles, in_features: int) -> None:
    check(library, problem((70, 5), 40, in_features, padding=-in_features % 4 + 4, bias=True), tiles)


@pytest.mark.parametrize("width", [1, 3, 8, 63, 64, 65, 129])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_widths(library: SimtLibrary, gated: bool, width: int) -> None:
    check(library, problem((9, 66), 2 * width if gated else width, 20, gated=gated, bias=True), SMALL)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_epilogues(library: SimtLibrary, gated: bool, activation: str) -> None:
    check(library, problem((20, 90), 136, 32, gated=gated, bias=True, scaled=True, activation=activation), LARGE)


@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=str)
def test_transposed_weights(library: SimtLibrary, tiles: Tiles) -> None:
    p = problem(RAGGED, 168, 76, transposed=True, scaled=True, unused=3)
    expected = check(library, p, tiles)
    assert len(library.launches) == 1
    # K in order, one product after the other, whichever way the weights lie.
    inputs = make_inputs(p)
    turned = replace(inputs, weight=inputs.weight.transpose(1, 2).contiguous())
    assert torch.equal(launch(library, replace(p, transposed=False), turned, tiles), expected)


# The first four are aligned, but for the last elements of a row.
@pytest.mark.parametrize(
    ("width", "in_features", "padding", "shift"),
    [(1, 1, 3, 0), (37, 25, 3, 0), (129, 13, 3, 0), (40, 0, 4, 0), (45, 37, 0, 0), (32, 32, 0, 1), (129, 15, 3, 2)],
)
def test_transposed_weights_of_any_size(
    library: SimtLibrary, width: int, in_features: int, padding: int, shift: int
) -> None:
    p = problem((5, 0, 66), width, in_features, transposed=True, gathered=True, padding=padding, shift=shift, unused=2)
    check(library, p, SMALL)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=str)
def test_orders_of_execution(library: SimtLibrary, tiles: Tiles, seed: int, transposed: bool, timing: Timing) -> None:
    settings = Settings(seed=seed, timing=timing, sm_count=1, compute_capability=80)
    p = problem((150, 3, 0), 136, 116, gated=True, gathered=True, activation="silu")
    if transposed:
        p = problem((70, 3, 0), 136, 76, transposed=True)
    check(library, p, tiles, settings, seed=seed)


def test_tiles_and_schedule_do_not_change_a_bit(library: SimtLibrary) -> None:
    p = problem(RAGGED, 264, 72, gated=True, activation="silu")
    expected = check(library, p, SMALL)
    for tiles in (Tiles(64, 4, group_m=1), LARGE, Tiles(128, 3, group_m=16)):
        for sm_count in (1, 16):
            assert torch.equal(launch(library, p, make_inputs(p), tiles, Settings(sm_count=sm_count)), expected)


@pytest.mark.parametrize("offsets", [[-5, 40, 2**31 - 1], [100, 7, -3], [2**31 - 1, -(2**31), 2**31 - 1]])
def test_bad_offsets_stay_inside_the_tensors(library: SimtLibrary, offsets: list[int]) -> None:
    p = problem((40, 40), 64, 32)
    launch(library, p, replace(make_inputs(p), expert_offsets=torch.tensor(offsets).int()), SMALL)


def test_values_that_are_not_finite_stay_in_their_row(library: SimtLibrary) -> None:
    p = problem((5, 70), 72, 32)
    inputs = make_inputs(p)
    expected = launch(library, p, inputs, SMALL)
    inputs.rows[4, 3] = float("nan")
    inputs.rows[5, 30] = float("inf")
    actual = launch(library, p, inputs, SMALL)
    touched = (torch.arange(75) == 4) | (torch.arange(75) == 5)
    assert not actual[touched].isfinite().any()
    assert torch.equal(actual[~touched], expected[~touched])


@pytest.mark.parametrize(("tiles", "shift"), [(Tiles(128, 4), 0), (Tiles(64, 3), 0), (LARGE, 1)])
def test_a_configuration_nobody_built_is_an_error(library: SimtLibrary, tiles: Tiles, shift: int) -> None:
    p = problem((5, 6), 64, 64, shift=shift)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), tiles)


def test_another_dtype_is_an_error(library: SimtLibrary) -> None:
    p = Problem((5, 6), 64, 64, dtype=torch.bfloat16)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), SMALL)
