"""The Hopper grouped GEMM: wgmma, TMA, cp.async and mbarriers, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tests.simt import gemm_problems, params
from tests.simt.build import REPOSITORY, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing
from tests.simt.gemm_problems import Inputs, Problem, make_inputs
from tests.tolerance import assert_accurate

Case = TypeVar("Case")
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
STAGES = {128: 6, 256: 4}  # by tile_n
RAGGED = (130, 0, 1, 37, 0, 64, 65)
GATHERED = pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    launcher = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_gemm_sm90.cu"
    return simt.library(launcher, "gemm/grouped_gemm_sm90.cu", *instances("grouped_gemm_sm90_"))


def launch(
    library: SimtLibrary,
    p: Problem,
    inputs: Inputs,
    tile_n: int = 128,
    group_m: int = 2,
    settings: Settings | None = None,
    cluster: int = 1,
    in_turn: bool = False,
) -> Tensor:
    library.call("set_tiles", tile_n, STAGES.get(tile_n, 4), group_m, cluster, int(in_turn))
    return gemm_problems.launch(library, p, inputs, settings=settings)


def check(
    library: SimtLibrary, p: Problem, tile_n: int = 128, group_m: int = 2, settings: Settings | None = None
) -> Tensor:
    inputs = make_inputs(p)
    actual = launch(library, p, inputs, tile_n, group_m, settings)
    # The reference sums in float32 and rounds once, as the kernel does: as strict a bound as there is.
    assert_accurate(actual, inputs.to(torch.float64).reference(p), inputs.reference(p))
    return actual


@pytest.mark.parametrize("tile_n", STAGES)
@GATHERED
@GATED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_instantiation(
    library: SimtLibrary, dtype: torch.dtype, gated: bool, gathered: bool, tile_n: int
) -> None:
    # Columns and depth end inside a tile; the gate's last box runs on into the values.
    check(library, Problem(RAGGED, 2 * 168, 200, gated=gated, gathered=gathered, dtype=dtype, unused=3), tile_n)
    assert len(library.launches) == 1
    assert "grouped_gemm_sm90_kernel" in library.launches[0]


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (128,), (129,), (64, 65), (0, 0, 300), (1,) * 40])
@GATHERED
def test_routings(library: SimtLibrary, gathered: bool, counts: tuple[int, ...]) -> None:
    check(library, Problem(counts, 72, 64, gathered=gathered, unused=5))


# 63 and the like: the last 16 bytes that are read hold values past the row's end.
@pytest.mark.parametrize("in_features", [1, 7, 8, 63, 64, 65, 128, 320])
@GATHERED
def test_depths(library: SimtLibrary, gathered: bool, in_features: int) -> None:
    check(library, Problem((70, 5), 40, in_features, gathered=gathered, padding=-in_features % 8 + 8))


# Widths that are not multiples of 8 are stored one element at a time.
@pytest.mark.parametrize("width", [1, 8, 63, 120, 128, 257])
@GATED
def test_widths(library: SimtLibrary, gated: bool, width: int) -> None:
    for tile_n in STAGES:
        check(library, Problem((9, 66), 2 * width if gated else width, 72, gated=gated, bias=True), tile_n)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@GATED
def test_epilogues(library: SimtLibrary, gated: bool, activation: str) -> None:
    p = Problem((20, 90), 144, 64, gated=gated, activation=activation)
    for bias, scaled in ((False, True), (True, False), (True, True)):
        check(library, replace(p, bias=bias, scaled=scaled))


@pytest.mark.parametrize("tile_n", STAGES)
@GATHERED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transposed_weights(library: SimtLibrary, dtype: torch.dtype, gathered: bool, tile_n: int) -> None:
    p = Problem(RAGGED, 168, 200, transposed=True, scaled=True, gathered=gathered, dtype=dtype, unused=3)
    expected = check(library, p, tile_n)
    assert len(library.launches) == 1
    # The same multiplications in the same order, whichever way the weights lie.
    inputs = make_inputs(p)
    turned = replace(inputs, weight=inputs.weight.transpose(1, 2).contiguous())
    assert torch.equal(launch(library, replace(p, transposed=False), turned, tile_n), expected)


@pytest.mark.parametrize(
    ("width", "in_features", "padding"),
    [(1, 1, 7), (37, 29, 3), (129, 65, 7), (63, 127, 1), (64, 64, 0), (128, 8, 0), (264, 72, 0)],
)
def test_transposed_weights_of_any_size(library: SimtLibrary, width: int, in_features: int, padding: int) -> None:
    p = Problem((5, 0, 66), width, in_features, transposed=True, padding=padding, unused=2)
    for tile_n in STAGES:
        check(library, p, tile_n)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@GATHERED
def test_orders_of_execution(library: SimtLibrary, gathered: bool, transposed: bool, seed: int, timing: Timing) -> None:
    # Two blocks take many tiles each; the ring of stages wraps within tiles and across them.
    settings = Settings(seed=seed, timing=timing, sm_count=2)
    p = Problem((150, 3, 0, 129), 200, 328, gated=True, gathered=gathered, bias=True, activation="silu")
    if transposed:
        p = Problem((70, 3, 0, 9), 136, 328, gathered=gathered, transposed=True)
    check(library, p, settings=settings)


def test_neither_schedule_nor_tile_width_changes_a_bit(library: SimtLibrary) -> None:
    p = Problem((300, 2, 260), 400, 72, gated=True, gathered=True, bias=True, activation="silu")
    inputs = make_inputs(p)
    first = launch(library, p, inputs)
    for tile_n, group_m, sm_count in ((128, 1, 1), (128, 16, 64), (256, 1, 3), (256, 2, 1), (256, 16, 4)):
        assert torch.equal(launch(library, p, inputs, tile_n, group_m, Settings(sm_count=sm_count)), first)


def every_other(cases: Sequence[Case], gathered: bool, tile_n: int) -> list[tuple[int, Case]]:
    """Half of them, with their numbers: each meets both widths of tiles, and rows both in order and gathered."""
    return [(i, case) for i, case in enumerate(cases) if i % 2 == (gathered + (tile_n == 256)) % 2]


PAIRS = ((130, 0, 1, 37, 0, 64, 65), (0, 0, 0), (1,), (256, 257, 128, 129), (300, 2, 260))


@pytest.mark.parametrize("kind", ["plain", "gated", "transposed"])
@pytest.mark.parametrize("tile_n", STAGES)
@GATHERED
def test_pairs_of_blocks_that_share_weights(library: SimtLibrary, gathered: bool, tile_n: int, kind: str) -> None:
    """Whatever is left over: rows for one of two blocks, a multiprocessor without a partner. The bits are the same."""
    for seed, counts in every_other(PAIRS, gathered, tile_n):
        p = Problem(counts, 2 * 136, 200, kind == "gated", gathered, transposed=kind == "transposed", unused=3)
        inputs = make_inputs(p)
        settings = Settings(seed=seed, timing=TIMINGS[seed % 3], sm_count=(4, 2, 5)[seed % 3])
        paired = launch(library, p, inputs, tile_n, settings=settings, cluster=2, in_turn=seed % 2 == 0)
        assert int(library.launches[0].split("<<<(")[1].split(",")[0]) % 2 == 0
        assert torch.equal(paired, launch(library, p, inputs, tile_n))
        assert_accurate(paired, inputs.to(torch.float64).reference(p), inputs.reference(p))


@pytest.mark.parametrize("kind", ["plain", "gated", "transposed"])
@pytest.mark.parametrize("tile_n", STAGES)
@GATHERED
def test_consumers_in_turn(library: SimtLibrary, gathered: bool, tile_n: int, kind: str) -> None:
    """In tiles of fewer steps than stages, of just as many and of more; with and without rows for the second one."""
    for seed, steps in every_other((3, STAGES[tile_n], STAGES[tile_n] + 3), gathered, tile_n):
        p = Problem((200, 64, 65, 1), 144, 64 * steps, kind == "gated", gathered, bias=kind == "plain",
                    transposed=kind == "transposed")  # fmt: skip
        inputs = make_inputs(p)
        expected = launch(library, p, inputs, tile_n)
        for cluster in (1, 2):
            settings = Settings(seed=seed, timing=TIMINGS[(seed + cluster) % 3], sm_count=cluster)
            turned = launch(library, p, inputs, tile_n, settings=settings, cluster=cluster, in_turn=True)
            assert torch.equal(turned, expected), (steps, cluster)


@pytest.mark.parametrize("cluster", [0, 3])
def test_clusters_of_other_sizes_are_an_error(library: SimtLibrary, cluster: int) -> None:
    p = Problem((5, 6), 64, 64)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), cluster=cluster)


def test_tensor_maps_are_told_apart(library: SimtLibrary) -> None:
    # Equal pointers with other shapes, equal shapes with other pointers, and one pointer whose content changes.
    p = Problem((5, 6), 64, 128)
    x = make_inputs(p)
    for changed_p, changed_x in (
        (p, x),
        (replace(p, in_features=64), replace(x, rows=x.rows[:, :64], weight=x.weight[:, :, :64])),
        (p, replace(x, weight=x.weight + 1)),
        (p, replace(x, rows=x.rows.flip(0))),
        (p, replace(x, weight=x.weight.neg_())),
    ):
        actual = launch(library, changed_p, changed_x)
        assert_accurate(actual, changed_x.to(torch.float64).reference(changed_p), changed_x.reference(changed_p))


@pytest.mark.parametrize("offsets", [[-5, 40, 2**31 - 1], [100, 7, -3], [0, 90, 80], [2**31 - 1, -(2**31), 2**31 - 1]])
@GATHERED
def test_offsets_that_do_not_fit_are_clamped(library: SimtLibrary, gathered: bool, offsets: list[int]) -> None:
    p = Problem((40, 40), 64, 64, gathered=gathered)
    inputs = replace(make_inputs(p), expert_offsets=torch.tensor(offsets, dtype=torch.int32))
    launch(library, p, inputs)  # any access outside is an error
    assert len(library.launches) == 1


@GATHERED
def test_what_is_not_finite_stays_in_its_row(library: SimtLibrary, gathered: bool) -> None:
    p = Problem((5, 70), 72, 64, gathered=gathered)
    inputs = make_inputs(p)
    source = torch.arange(75)
    if gathered:
        source %= inputs.rows.shape[0]
        inputs.token_of_row = source.int()
    clean = launch(library, p, inputs)
    inputs.rows[4, 3] = float("nan")
    inputs.rows[5, 60] = float("inf")
    actual = launch(library, p, inputs)
    touched = (source == 4) | (source == 5)
    assert not actual[touched].isfinite().any()
    assert torch.equal(actual[~touched], clean[~touched])


def test_no_source_rows_at_all(library: SimtLibrary) -> None:
    p = Problem((3, 4), 64, 64, gathered=True, bias=True)
    inputs = make_inputs(p)
    inputs.rows = inputs.rows[:0]
    actual = launch(library, p, inputs)
    assert inputs.bias is not None
    assert torch.equal(actual, inputs.bias.repeat_interleave(torch.tensor([3, 4]), 0))


def test_what_tma_cannot_serve_goes_elsewhere(library: SimtLibrary) -> None:
    def fallbacks() -> int:
        count = torch.zeros(1, dtype=torch.int32)
        library.call("count_fallbacks", count)
        return int(count.item())

    p = Problem((5, 6), 64, 64)
    before = fallbacks()
    launch(library, p, make_inputs(p))
    assert fallbacks() == before
    for count, changed in enumerate((replace(p, in_features=0), replace(p, padding=4), replace(p, shift=1)), start=1):
        launch(library, changed, make_inputs(changed))
        assert library.launches == []
        assert fallbacks() == before + count


def test_tiles_that_nobody_built_are_an_error(library: SimtLibrary) -> None:
    p = Problem((5, 6), 64, 64)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, p, make_inputs(p), tile_n=64)


@pytest.mark.parametrize(
    "sizes",
    [dict(num_rows=2**30, out_features=2**24, in_features=64), dict(num_rows=8, out_features=64, in_features=2**31)],
)
def test_sizes_beyond_32_bits_are_an_error(library: SimtLibrary, sizes: dict[str, int]) -> None:
    somewhere = torch.zeros(64).bfloat16()
    library.call("set_tiles", 128, STAGES[128], 2, 1, 0)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        library.run(
            "grouped_gemm", rows=somewhere, weight=somewhere, out=somewhere.clone(), bias=None, row_scale=None,
            token_of_row=torch.zeros(8, dtype=torch.int32), expert_offsets=torch.zeros(2, dtype=torch.int32),
            num_source_rows=1, row_stride=64, weight_expert_stride=64, weight_row_stride=64, bias_stride=0,
            num_experts=1, num_parts=1, activation=0, gated=False, transposed=False, allow_tf32=False,
            batch_invariant=False, dtype=torch.bfloat16, swiglu=params.Swiglu(), **sizes,
        )  # fmt: skip
    assert library.launches == []


@pytest.mark.parametrize("smem_offset", [16, 512])
@pytest.mark.parametrize("tile_n", STAGES)
def test_shared_memory_may_start_anywhere(library: SimtLibrary, tile_n: int, smem_offset: int) -> None:
    check(library, Problem((70, 5), 40, 72, gathered=True), tile_n, settings=Settings(smem_offset=smem_offset))
