"""The grouped GEMM for few rows per expert, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.simt.build import instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned
from tests.simt.gemm_problems import Problem, check, launch, make_inputs
from tests.simt.params import DType

# (tile_m, tile_n, tile_k) that are built
HALF_TILES = ((8, 32, 1024), (8, 16, 2048), (32, 32, 512))
FLOAT_TILES = ((8, 16, 512),)
CASES = [
    *((dtype, tiles) for dtype in (torch.bfloat16, torch.float16) for tiles in HALF_TILES),
    *((torch.float32, tiles) for tiles in FLOAT_TILES),
]
SOURCES = (
    Path(__file__).parent / "kernels" / "grouped_gemm_decode.cu",
    "gemm/grouped_gemm_decode.cu",
    *instances("grouped_gemm_decode_"),
)
RAGGED = (3, 0, 1, 9, 0, 40, 16)


@pytest.fixture(scope="module")
def built(simt: Simt) -> SimtLibrary:
    return simt.library(*SOURCES)


@pytest.fixture
def library(built: SimtLibrary) -> SimtLibrary:
    built.call("set_decode_tiles", 0, 0, 0)
    return built


@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("dtype", "tiles"), CASES, ids=str)
def test_every_instantiation(
    library: SimtLibrary, dtype: torch.dtype, tiles: tuple[int, int, int], gated: bool, gathered: bool
) -> None:
    # Several rounds of K with a tail, columns that end inside a tile, experts that take one pass and several.
    library.call("set_decode_tiles", *tiles)
    in_features = tiles[2] + 24
    check(library, Problem(RAGGED, 2 * 42, in_features, gated, gathered, bias=True, dtype=dtype, unused=3))
    assert len(library.launches) == 1
    assert "grouped_gemm_decode_kernel" in library.launches[0]


COUNTS = ((0, 0, 0), (1, 0, 0), (0, 1, 1), (8,), (9,), (0, 0, 33), (1,) * 40, (0,) * 130 + (2, 0, 1))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("tiles", HALF_TILES, ids=str)
def test_routings(library: SimtLibrary, tiles: tuple[int, int, int], counts: tuple[int, ...]) -> None:
    library.call("set_decode_tiles", *tiles)
    check(library, Problem(counts, 40, 64, unused=5))
    assert f"<<<({-(-40 // tiles[1])}, {min(len(counts), sum(counts) + 5)}, 1)" in library.launches[0]


@pytest.mark.parametrize("in_features", [8, 16, 56, 64, 72, 512, 520, 1024, 2048 + 8])
@pytest.mark.parametrize(("dtype", "tiles"), CASES[2:3] + CASES[0:1] + CASES[-1:], ids=str)
def test_depths(library: SimtLibrary, dtype: torch.dtype, tiles: tuple[int, int, int], in_features: int) -> None:
    library.call("set_decode_tiles", *tiles)
    check(library, Problem((5, 2), 20, in_features, gathered=True, dtype=dtype, padding=8))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 33, 65])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_widths(library: SimtLibrary, gated: bool, width: int) -> None:
    for tiles in HALF_TILES:
        library.call("set_decode_tiles", *tiles)
        check(library, Problem((9, 2), 2 * width if gated else width, 72, gated, bias=True, unused=1))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_epilogues(library: SimtLibrary, gated: bool, activation: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for bias, scaled in ((False, True), (True, False), (True, True)):
            check(library, Problem((4, 9), 80, 64, gated, False, bias, scaled, activation, dtype))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "tiles"), CASES[:3] + CASES[-1:], ids=str)
def test_orders_of_execution(library: SimtLibrary, dtype: torch.dtype, tiles: tuple[int, int, int], seed: int) -> None:
    library.call("set_decode_tiles", *tiles)
    problem = Problem((35, 3, 0, 1), 72, 264, gated=True, gathered=True, activation="silu", dtype=dtype)
    first = check(library, problem)
    again = check(library, problem, settings=Settings(seed=seed, compute_capability=80))
    assert torch.equal(first, again)


def test_all_tiles_give_the_same_bits(library: SimtLibrary) -> None:
    """The order of the sum over K depends on K alone: not on the tile, and not on the other rows."""
    problem = Problem((30, 2), 72, 1096, gated=True, bias=True, activation="silu")
    inputs = make_inputs(problem)
    results = []
    for tiles in HALF_TILES:
        library.call("set_decode_tiles", *tiles)
        results.append(launch(library, problem, inputs))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    few = replace(problem, counts=(1, 1))
    alone = replace(inputs, rows=inputs.rows[29:31].clone(), expert_offsets=torch.tensor([0, 1, 2]).int())
    assert torch.equal(launch(library, few, alone), results[0][29:31])


def test_bad_offsets_stay_inside_the_tensors(library: SimtLibrary) -> None:
    problem = Problem((10, 10), 40, 64, gathered=True)
    inputs = make_inputs(problem)
    for offsets in ([-5, 10, 2**31 - 1], [100, 7, -3], [0, 30, 15], [2**31 - 1, -(2**31), 2**31 - 1], [5, 5, 5]):
        broken = replace(inputs, expert_offsets=torch.tensor(offsets, dtype=torch.int32))
        launch(library, problem, broken)  # the runtime finds any access outside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_that_are_not_finite_stay_where_they_are(library: SimtLibrary, dtype: torch.dtype) -> None:
    problem = Problem((3, 5), 33, 72, dtype=dtype, padding=8)  # behind each row lie NaN
    inputs = make_inputs(problem)
    truth = inputs.reference(problem)
    inputs.rows[1, 3] = float("nan")
    inputs.rows[4, 71] = float("inf")
    inputs.weight[1, 7, 5] = float("nan")
    actual = launch(library, problem, inputs)
    untouched = torch.ones(8, 33, dtype=torch.bool)
    untouched[[1, 4]] = False
    untouched[3:, 7] = False
    assert not actual[~untouched].isfinite().any()
    torch.testing.assert_close(actual[untouched], truth[untouched], rtol=1e-2, atol=1e-2)


def test_what_it_cannot_serve_is_an_error(library: SimtLibrary) -> None:
    problem = Problem((5, 6), 64, 64)
    inputs = make_inputs(problem)
    odd = replace(problem, in_features=60)
    shorter = replace(inputs, rows=inputs.rows[:, :60], weight=inputs.weight[..., :60])
    shifted = replace(problem, in_features=56)
    unaligned = replace(inputs, rows=inputs.rows[:, 1:57], weight=inputs.weight[..., :56])
    for p, x in ((odd, shorter), (shifted, unaligned)):
        with pytest.raises(SimtError, match=r"cudaError_t 1$"):
            launch(library, p, x)
    library.call("set_decode_tiles", 16, 32, 1024)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, problem, inputs)


DECODE = 3  # GemmPath::kDecode
OLMOE_UP = (8, 64, 2048, 2048)  # top_k, experts, M, K
NLLB_MOE_DOWN = (2, 128, 2048, 8192)


def choose(
    library: SimtLibrary, tokens: int, layer: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16,
    *, aligned: bool = True, batch_invariant: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """Path, tile_m, tile_n and tile_k that choose_tile_config names for a GPU of 132 multiprocessors."""
    top_k, experts, out_features, in_features = layer
    config = poisoned((4,), torch.int32)
    shape = (tokens * top_k, out_features, in_features, experts)
    library.call("choose", config, *shape, DType.of(dtype), int(aligned), int(batch_invariant))
    return tuple(config.tolist())


def test_the_choice_of_path_and_tiles(library: SimtLibrary) -> None:
    assert choose(library, 1, OLMOE_UP) == (DECODE, 8, 32, 1024)
    assert choose(library, 16, OLMOE_UP) == (DECODE, 8, 32, 1024)
    assert choose(library, 32, OLMOE_UP) == (DECODE, 32, 32, 512)
    assert choose(library, 1, NLLB_MOE_DOWN) == (DECODE, 8, 16, 2048)  # few blocks: finer ones
    assert choose(library, 1, OLMOE_UP, torch.float32) == (DECODE, 8, 16, 512)
    assert choose(library, 64, OLMOE_UP)[0] != DECODE
    assert choose(library, 1, OLMOE_UP, aligned=False)[0] != DECODE
    assert choose(library, 1, OLMOE_UP, batch_invariant=True)[0] != DECODE
    assert choose(library, 1, (8, 64, 2048, 2044))[0] != DECODE  # rows of whole vectors only
