"""The weight gradients on the CUDA cores and by mma.sync, the bias gradient, and the entry point, on the CPU."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.simt.build import CUDA_SOURCES, REPOSITORY, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing
from tests.simt.params import DType
from tests.simt.weight_grad_problems import Tiles, WeightGradProblem, check, launch, make_inputs
from tests.tolerance import assert_accurate

CONFIG = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_weight_grad_config.cu"
F32, SM80, SM90 = range(3)
F32_SMALL, F32_LARGE = Tiles(F32, 64, 128, 4), Tiles(F32, 128, 128, 3)
SMALL, LARGE, SHALLOW = Tiles(SM80, 64, 128, 4), Tiles(SM80, 128, 128, 4), Tiles(SM80, 128, 128, 3)
EVERY = [
    *product([torch.float32], [F32_SMALL, F32_LARGE]),
    *product([torch.bfloat16, torch.float16], [SMALL, LARGE, SHALLOW]),
]
ONE_OF_EACH = [(torch.float32, F32_SMALL), (torch.bfloat16, SMALL)]
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
RAGGED = (70, 0, 1, 37, 0, 32)
AMPERE, HOPPER = Settings(compute_capability=80), Settings(compute_capability=90)


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    sources = sorted(s for s in (CUDA_SOURCES / "weight_grad").glob("*.cu") if s.name != "grouped_weight_grad.cu")
    return simt.library(CONFIG, *sources, *instances("grouped_weight_grad_"))


# ---- the tiled paths ----


@pytest.mark.parametrize(("dtype", "tiles"), EVERY, ids=str)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_every_instantiation(library: SimtLibrary, gathered: bool, dtype: torch.dtype, tiles: Tiles) -> None:
    p = WeightGradProblem(RAGGED, 152, 136, gathered=gathered, grad_gathered=gathered, dtype=dtype)
    check(library, p, tiles)
    assert len(library.launches) == 1
    assert f"grouped_weight_grad_{'f32' if tiles.path == F32 else 'sm80'}_kernel" in library.launches[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_consumer_cards(library: SimtLibrary, capability: int, dtype: torch.dtype) -> None:
    """100 KB of shared memory for two blocks of a multiprocessor, each with 1 KB of the system's."""
    p = WeightGradProblem((40, 0, 9), 136, 72, gathered=True, dtype=dtype)
    for sm_count in (1, 64):  # large tiles and small ones
        check(library, p, settings=Settings(compute_capability=capability, sm_count=sm_count))
        assert not any("sm90" in line for line in library.launches)
        for line in library.launches:
            smem = int(line.split("), ")[-1].split(">>>")[0])
            assert 2 * (smem + 1024) <= 100 * 1024, line


# The first four are aligned, but for the last elements of a row.
@pytest.mark.parametrize(
    ("out_features", "in_features", "padding", "shift"),
    [(1, 1, 7, 0), (37, 29, 3, 0), (129, 17, 7, 0), (65, 129, 7, 0), (45, 37, 0, 0), (32, 64, 0, 1), (129, 31, 3, 5)],
)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
@pytest.mark.parametrize(("dtype", "tiles"), ONE_OF_EACH, ids=str)
def test_sizes(
    library: SimtLibrary,
    dtype: torch.dtype,
    tiles: Tiles,
    gathered: bool,
    out_features: int,
    in_features: int,
    padding: int,
    shift: int,
) -> None:
    p = WeightGradProblem((5, 0, 36), out_features, in_features, dtype=dtype, padding=padding, shift=shift)
    check(library, replace(p, gathered=gathered, grad_gathered=not gathered), tiles)


@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (1, 0, 0), (0, 0, 150), (1,) * 40, (15, 16, 17), (31, 32, 33), (63, 64, 65)], ids=str
)
@pytest.mark.parametrize(("dtype", "tiles"), ONE_OF_EACH, ids=str)
def test_routings(library: SimtLibrary, dtype: torch.dtype, tiles: Tiles, counts: tuple[int, ...]) -> None:
    check(library, WeightGradProblem(counts, 24, 16, dtype=dtype, gathered=True), tiles)
    grad_weight = check(library, WeightGradProblem(counts, 24, 16, dtype=dtype), tiles)
    for count, gradient in zip(counts, grad_weight, strict=True):
        assert count > 0 or torch.equal(gradient, torch.zeros(24, 16, dtype=dtype))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "tiles"), [(torch.float32, F32_LARGE), (torch.bfloat16, LARGE)], ids=str)
def test_orders_of_execution(library: SimtLibrary, dtype: torch.dtype, tiles: Tiles, seed: int, timing: Timing) -> None:
    p = WeightGradProblem((190, 0, 3), 136, 72, gathered=True, dtype=dtype)
    check(library, p, tiles, Settings(seed=seed, timing=timing, compute_capability=80), seed=seed)


@pytest.mark.parametrize(("dtype", "small", "large"), [(torch.float32, F32_SMALL, F32_LARGE),
                                                       (torch.bfloat16, SMALL, LARGE)], ids=str)  # fmt: skip
def test_all_tiles_sum_in_the_same_order(library: SimtLibrary, dtype: torch.dtype, small: Tiles, large: Tiles) -> None:
    p = WeightGradProblem(RAGGED, 136, 72, grad_gathered=True, dtype=dtype)
    expected = check(library, p, small)
    assert torch.equal(launch(library, p, make_inputs(p), large, Settings(seed=5))[0], expected)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_tf32(library: SimtLibrary, shift: int) -> None:
    p = WeightGradProblem(RAGGED, 84, 76, dtype=torch.float32, shift=shift, gathered=True)
    inputs = make_inputs(p)

    def rounded(x: Tensor) -> Tensor:
        """To the 10 bits of tf32's fraction, ties away from zero."""
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    exact = replace(inputs, rows=rounded(inputs.rows), grad_rows=rounded(inputs.grad_rows))
    truth, plain = exact.to(torch.float64).reference()[0], exact.reference()[0]
    for tiles in (SMALL,) if shift else (SMALL, LARGE, SHALLOW):
        # Products of tf32 numbers are exact, so all that is left is float32's own error.
        assert_accurate(launch(library, p, inputs, tiles, allow_tf32=True)[0], truth, plain)


@pytest.mark.parametrize(
    ("dtype", "tiles", "shift"),
    [
        (torch.bfloat16, Tiles(SM80, 96, 128, 4), 0),
        (torch.bfloat16, LARGE, 1),
        (torch.float32, F32_LARGE, 1),
        (torch.float32, Tiles(F32, 128, 128, 4), 0),
        (torch.bfloat16, F32_SMALL, 0),
        (torch.bfloat16, Tiles(3, 64, 128, 4), 0),
    ],
    ids=str,
)
def test_a_configuration_nobody_built_is_an_error(
    library: SimtLibrary, dtype: torch.dtype, tiles: Tiles, shift: int
) -> None:
    p = WeightGradProblem((5, 6), 64, 64, dtype=dtype, shift=shift)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), tiles)


# ---- every path, and the bias ----


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize(("gathered", "scaled"), [(False, True), (True, False)])
def test_weights_and_biases(
    library: SimtLibrary, gathered: bool, scaled: bool, shift: int, dtype: torch.dtype, settings: Settings
) -> None:
    p = WeightGradProblem(RAGGED, 72, 40, gathered, gathered, scaled, dtype, shift=shift)
    check(library, p, settings=settings)
    bias, weight = library.launches
    assert "grouped_bias_grad_kernel" in bias
    path = "f32" if dtype == torch.float32 else "sm80" if shift or settings is AMPERE else "sm90"
    assert f"grouped_weight_grad_{path}_kernel" in weight


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_expert(
    library: SimtLibrary, bad: float, gathered: bool, dtype: torch.dtype, settings: Settings
) -> None:
    """Experts end inside a stage; the rows behind are the next expert's."""
    p = WeightGradProblem((5, 3, 0, 40, 2), 24, 16, dtype=dtype)
    inputs = make_inputs(p)
    if gathered:
        order = torch.randperm(53, generator=torch.Generator().manual_seed(3))
        inputs.token_of_row = inputs.grad_token_of_row = order.argsort().int()
        inputs.rows, inputs.grad_rows = inputs.rows[order].clone(), inputs.grad_rows[order].clone()
    expected, expected_bias = launch(library, p, inputs, settings=settings)
    poisoned_rows = torch.arange(5, 8) if inputs.token_of_row is None else inputs.token_of_row[5:8].long()
    inputs.rows[poisoned_rows[:2]] = bad
    inputs.grad_rows[poisoned_rows[1:]] = bad
    actual, actual_bias = launch(library, p, inputs, settings=settings)
    others = torch.tensor([0, 2, 3, 4])
    assert expected.isfinite().all()
    assert not actual[1].isfinite().any()
    assert torch.equal(actual[others], expected[others])
    assert torch.equal(actual_bias[others], expected_bias[others])


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows_at_all_means_zeros(library: SimtLibrary, dtype: torch.dtype, settings: Settings) -> None:
    for gathered, unused in ((False, 0), (True, 0), (False, 70)):
        p = WeightGradProblem((0, 0), 24, 16, gathered, gathered, dtype=dtype, unused=unused)
        grad_weight, grad_bias = launch(library, p, make_inputs(p), settings=settings)
        assert torch.equal(grad_weight, torch.zeros(2, 24, 16, dtype=dtype))
        assert torch.equal(grad_bias, torch.zeros(2, 24, dtype=dtype))


@pytest.mark.parametrize("offsets", [[-5, 40, 2**31 - 1], [100, 7, -3], [2**31 - 1, -(2**31), 2**31 - 1]])
@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_offsets_stay_inside_the_tensors(
    library: SimtLibrary, dtype: torch.dtype, settings: Settings, offsets: list[int]
) -> None:
    for gathered in (False, True):
        p = WeightGradProblem((40, 40), 64, 32, gathered, dtype=dtype)
        launch(library, p, replace(make_inputs(p), expert_offsets=torch.tensor(offsets).int()), settings=settings)


@pytest.mark.parametrize("width", [1, 7, 8, 33, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_alone(library: SimtLibrary, dtype: torch.dtype, width: int) -> None:
    for padding in (0, -width % 8):
        p = WeightGradProblem((70, 0, 33, 1), width, 8, grad_gathered=True, scaled=True, dtype=dtype, padding=padding)
        inputs = make_inputs(p)
        grad_weight, grad_bias = launch(library, p, inputs, need_weight=False)
        assert len(library.launches) == 1
        assert grad_weight.isnan().all()
        assert_accurate(grad_bias, inputs.to(torch.float64).reference()[1], inputs.reference()[1])


def test_empty_weights(library: SimtLibrary) -> None:
    launch(library, WeightGradProblem((3, 2), 0, 8), make_inputs(WeightGradProblem((3, 2), 0, 8)))
    assert library.launches == []
    p = WeightGradProblem((3, 2), 8, 0)
    inputs = make_inputs(p)
    _, grad_bias = launch(library, p, inputs)
    assert len(library.launches) == 1
    assert_accurate(grad_bias, inputs.to(torch.float64).reference()[1], inputs.reference()[1])
    launch(library, WeightGradProblem((), 8, 8), make_inputs(WeightGradProblem((), 8, 8)))
    assert library.launches == []


# ---- the choice ----


@dataclass(frozen=True)
class Choice:
    """WeightGradProblem of csrc/cuda/weight_grad/weight_grad_config.h."""

    num_rows: int = 8192
    out_features: int = 2048
    in_features: int = 2048
    num_experts: int = 64
    dtype: DType = DType.BFLOAT16
    aligned: bool = True
    allow_tf32: bool = False
    compute_capability: int = 90
    sm_count: int = 132


def choose(library: SimtLibrary, problem: Choice) -> tuple[int, ...]:
    chosen = torch.zeros(5, dtype=torch.int64)
    library.call("choose", torch.tensor([int(x) for x in astuple(problem)]), chosen)
    return tuple(chosen.tolist())


def test_choices(library: SimtLibrary) -> None:
    assert choose(library, Choice()) == (SM90, 128, 256, 64, 4)
    for row_tiles, tile_n, stages in ((66, 128, 6), (67, 256, 4)):  # 132 narrow tiles run at once
        problem = Choice(num_experts=1, out_features=128 * row_tiles, in_features=256)
        assert choose(library, problem) == (SM90, 128, tile_n, 64, stages)
    assert choose(library, Choice(in_features=128)) == (SM90, 128, 128, 64, 6)
    assert choose(library, Choice(num_rows=0))[0] == SM80
    assert choose(library, Choice(aligned=False)) == (SM80, 64, 128, 32, 4)
    assert choose(library, Choice(compute_capability=80)) == (SM80, 128, 128, 32, 4)
    assert choose(library, Choice(compute_capability=86)) == (SM80, 128, 128, 32, 3)
    assert choose(library, Choice(compute_capability=80, num_experts=1, out_features=256)) == (SM80, 64, 128, 32, 4)
    assert choose(library, Choice(dtype=DType.FLOAT32)) == (F32, 128, 128, 16, 3)
    assert choose(library, Choice(dtype=DType.FLOAT32, out_features=64)) == (F32, 64, 128, 16, 4)
    assert choose(library, Choice(dtype=DType.FLOAT32, allow_tf32=True)) == (SM80, 128, 128, 16, 4)


def test_every_choice_is_built(library: SimtLibrary) -> None:
    built = {F32_SMALL, F32_LARGE, SMALL, LARGE, SHALLOW, (SM90, 128, 128, 6), (SM90, 128, 256, 4)}
    for rows, (m, k), experts, dtype, capability in product(
        (0, 1, 10**6), ((2, 1), (130, 37), (2048, 1024)), (1, 64), DType, (80, 86, 90)
    ):
        for aligned, tf32 in product((False, True), repeat=2):
            config = choose(library, Choice(rows, m, k, experts, dtype, aligned, tf32, capability))
            path, tile_m, tile_n, _, stages = config
            assert (path, tile_m, tile_n, stages) in built
            assert aligned or (path != SM90 and tile_m == 64)
            assert (path == F32) == (dtype == DType.FLOAT32 and not tf32)
