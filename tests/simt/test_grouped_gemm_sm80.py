"""The sm_80 grouped GEMM: cp.async, ldmatrix and mma.sync, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.simt.build import REPOSITORY, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing
from tests.simt.gemm_problems import Problem, Tiles, check, launch, make_inputs
from tests.tolerance import assert_accurate

PATH = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_gemm_path.cu"
SMALL = Tiles(64, 4)
LARGE = Tiles(128, 4)
SHALLOW = Tiles(128, 3)
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
RAGGED = (130, 0, 1, 37, 0, 64)


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library(PATH, "gemm/grouped_gemm_sm80.cu", *instances("grouped_gemm_sm80_"), defines=("PATH=sm80",))


@pytest.mark.parametrize("tiles", [SMALL, LARGE, SHALLOW], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_instantiation(library: SimtLibrary, dtype: torch.dtype, gated: bool, tiles: Tiles) -> None:
    # Columns and depth end inside a tile.
    p = Problem(RAGGED, 2 * 84, 152, gated=gated, gathered=gated, dtype=dtype, unused=3)
    check(library, p, tiles)
    assert len(library.launches) == 1
    assert "grouped_gemm_sm80_kernel" in library.launches[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("in_features", "padding", "shift"), [(64, 0, 1), (37, 0, 0), (64, 3, 0), (1, 0, 5)])
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_rows_that_are_not_aligned(
    library: SimtLibrary, gathered: bool, in_features: int, padding: int, shift: int, dtype: torch.dtype
) -> None:
    p = Problem(
        (5, 0, 66), 45, in_features, gathered=gathered, bias=True, padding=padding, shift=shift, dtype=dtype, unused=2
    )
    check(library, p, SMALL)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (64,), (65,), (0, 0, 200), (1,) * 40], ids=str)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_routings(library: SimtLibrary, gathered: bool, counts: tuple[int, ...]) -> None:
    check(library, Problem(counts, 72, 64, gathered=gathered, unused=5), SMALL)


# 37 with aligned rows: a chunk of 16 bytes that is half tail.
@pytest.mark.parametrize("in_features", [1, 8, 31, 32, 33, 37, 96, 256])
@pytest.mark.parametrize("tiles", [SMALL, LARGE, SHALLOW], ids=str)
def test_depths(library: SimtLibrary, tiles: Tiles, in_features: int) -> None:
    check(library, Problem((70, 5), 40, in_features, padding=-in_features % 8 + 8), tiles)


def test_no_depth_at_all(library: SimtLibrary) -> None:
    p = Problem((3, 2), 24, 0, bias=True, activation="silu", gated=True)
    inputs = replace(make_inputs(p), rows=torch.empty(5, 0).bfloat16(), weight=torch.empty(2, 24, 0).bfloat16())
    assert_accurate(launch(library, p, inputs, SMALL), inputs.to(torch.float64).reference(p), inputs.reference(p))


@pytest.mark.parametrize("width", [1, 7, 8, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_widths(library: SimtLibrary, gated: bool, width: int) -> None:
    check(library, Problem((9, 66), 2 * width if gated else width, 40, gated=gated, bias=True), SMALL)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_epilogues(library: SimtLibrary, gated: bool, activation: str) -> None:
    for bias, scaled in ((False, True), (True, False), (True, True)):
        p = Problem((20, 90), 136, 64, gated=gated, bias=bias, scaled=scaled, activation=activation)
        check(library, p, LARGE)


@pytest.mark.parametrize("tiles", [SMALL, LARGE, SHALLOW], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transposed_weights(library: SimtLibrary, dtype: torch.dtype, tiles: Tiles) -> None:
    p = Problem(RAGGED, 168, 152, transposed=True, scaled=True, dtype=dtype, unused=3)
    expected = check(library, p, tiles)
    assert len(library.launches) == 1
    # The same multiplications in the same order, whichever way the weights lie.
    inputs = make_inputs(p)
    turned = replace(inputs, weight=inputs.weight.transpose(1, 2).contiguous())
    assert torch.equal(launch(library, replace(p, transposed=False), turned, tiles), expected)


# The first four are aligned, but for the last elements of a row.
@pytest.mark.parametrize(
    ("width", "in_features", "padding", "shift"),
    [(1, 1, 7, 0), (37, 29, 3, 0), (129, 33, 7, 0), (40, 0, 8, 0), (45, 37, 0, 0), (64, 64, 0, 1), (129, 31, 3, 5)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_transposed_weights_of_any_size(
    library: SimtLibrary, dtype: torch.dtype, width: int, in_features: int, padding: int, shift: int
) -> None:
    p = Problem((5, 0, 66), width, in_features, transposed=True, gathered=True, padding=padding, shift=shift, unused=2)
    if dtype == torch.bfloat16:
        check(library, p, SMALL)
    else:
        check_tf32(library, replace(p, dtype=dtype), SMALL)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=str)
def test_orders_of_execution(library: SimtLibrary, tiles: Tiles, seed: int, transposed: bool, timing: Timing) -> None:
    # One block on one multiprocessor of two takes several tiles; the ring of stages wraps.
    settings = Settings(seed=seed, timing=timing, sm_count=1, compute_capability=80)
    p = Problem((150, 3, 0, 129), 136, 232, gated=True, gathered=True, bias=True, activation="silu")
    if transposed:
        p = Problem((70, 3, 0), 136, 168, transposed=True, gathered=True)
    check(library, p, tiles, settings, seed=seed)


@pytest.mark.parametrize("group_m", [1, 2, 16])
def test_the_schedule_does_not_change_the_result(library: SimtLibrary, group_m: int) -> None:
    p = Problem((300, 2, 200), 264, 72, gathered=True)
    expected = check(library, p, SMALL)
    for sm_count in (1, 64):
        actual = launch(library, p, make_inputs(p), Tiles(64, 4, group_m), Settings(sm_count=sm_count))
        assert torch.equal(actual, expected)


def _same_bits(library: SimtLibrary, p: Problem, *tiles: Tiles) -> bool:
    results = [launch(library, p, make_inputs(p), t) for t in tiles]
    return all(torch.equal(results[0], r) for r in results)


def test_all_tiles_sum_in_the_same_order(library: SimtLibrary) -> None:
    assert _same_bits(library, Problem(RAGGED, 136, 200, gated=True, activation="silu"), SMALL, LARGE, SHALLOW)


def test_an_output_does_not_depend_on_the_other_rows(library: SimtLibrary) -> None:
    p = Problem((3, 70), 72, 104)
    inputs = make_inputs(p)
    together = launch(library, p, inputs, SMALL)
    alone = replace(p, counts=(0, 1))
    for row in (3, 40, 72):
        one = replace(inputs, rows=inputs.rows[row : row + 1].clone(), expert_offsets=torch.tensor([0, 0, 1]).int())
        assert torch.equal(launch(library, alone, one, SMALL)[0], together[row])


def check_tf32(library: SimtLibrary, p: Problem, *tiles: Tiles) -> None:
    inputs = make_inputs(p)

    def rounded(x: Tensor) -> Tensor:
        """To the 10 bits of tf32's fraction, ties away from zero."""
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    exact = replace(inputs, rows=rounded(inputs.rows), weight=rounded(inputs.weight))
    for t in tiles:
        actual = launch(library, p, inputs, t, allow_tf32=True)
        # Products of tf32 numbers are exact, so all that is left is float32's own error.
        assert_accurate(actual, exact.to(torch.float64).reference(p), exact.reference(p))


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_tf32(library: SimtLibrary, transposed: bool, shift: int) -> None:
    p = Problem(RAGGED, 84, 76, gathered=True, dtype=torch.float32, shift=shift, transposed=transposed)
    if not transposed:
        p = replace(p, gated=True, bias=True, activation="silu")
    check_tf32(library, p, *((SMALL,) if shift else (SMALL, LARGE, SHALLOW)))


@pytest.mark.parametrize("offsets", [[-5, 40, 2**31 - 1], [100, 7, -3], [0, 90, 80], [2**31 - 1, -(2**31), 2**31 - 1]])
def test_bad_offsets_stay_inside_the_tensors(library: SimtLibrary, offsets: list[int]) -> None:
    p = Problem((40, 40), 64, 64)
    launch(library, p, replace(make_inputs(p), expert_offsets=torch.tensor(offsets).int()), SMALL)


def test_no_source_rows(library: SimtLibrary) -> None:
    p = Problem((2, 3), 24, 32, bias=True, gathered=True, activation="relu")
    inputs = make_inputs(p)
    empty = replace(inputs, rows=torch.empty(0, 32).bfloat16())
    actual = launch(library, p, empty, SMALL)
    assert inputs.bias is not None
    assert torch.equal(actual, torch.relu(inputs.bias.repeat_interleave(torch.tensor([2, 3]), dim=0)))


def test_values_that_are_not_finite_stay_in_their_row(library: SimtLibrary) -> None:
    p = Problem((5, 70), 72, 64)
    inputs = make_inputs(p)
    expected = launch(library, p, inputs, SMALL)
    inputs.rows[4, 3] = float("nan")
    inputs.rows[5, 60] = float("inf")
    actual = launch(library, p, inputs, SMALL)
    touched = (torch.arange(75) == 4) | (torch.arange(75) == 5)
    assert not actual[touched].isfinite().any()
    assert torch.equal(actual[~touched], expected[~touched])


@pytest.mark.parametrize(("tiles", "shift"), [(Tiles(96, 4), 0), (Tiles(128, 5), 0), (Tiles(64, 3), 0), (LARGE, 1)])
def test_a_configuration_nobody_built_is_an_error(library: SimtLibrary, tiles: Tiles, shift: int) -> None:
    p = Problem((5, 6), 64, 64, shift=shift)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), tiles)
