"""Which grouped GEMM serves a problem, and how the entry point hands it on."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from enum import IntEnum
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from tests.generators import OLMOE, PHIMOE, REAL_LAYERS, SWITCH_BASE_8, LayerShape
from tests.simt.build import REPOSITORY
from tests.simt.device import Settings, Simt, SimtLibrary
from tests.simt.gemm_problems import Problem, launch, make_inputs
from tests.simt.params import DType

CALLS = REPOSITORY / "tests" / "simt" / "kernels" / "grouped_gemm_calls.cu"
MAX_EXPERTS = 1024  # kMaxExpertsPerLaunch


class Path(IntEnum):
    F32 = 0
    SM80 = 1
    SM90 = 2
    DECODE = 3


# tile_m, tile_n, tile_k, stages that the launchers of the tiled paths accept
BUILT = {
    Path.F32: {(64, 128, 16, 4), (128, 128, 16, 3)},
    Path.SM80: {(m, 128, k, s) for m, s in ((64, 4), (128, 4), (128, 3)) for k in (16, 32)},
    Path.SM90: {(128, 256, 64, 4), (128, 128, 64, 6)},
}


@dataclass(frozen=True)
class GemmProblem:
    """The struct of csrc/cuda/gemm/tile_config.h."""

    num_rows: int = 4096
    out_features: int = 2048
    in_features: int = 2048
    num_experts: int = 64
    dtype: DType = DType.BFLOAT16
    gated: bool = True
    gathered: bool = True
    aligned: bool = True
    allow_tf32: bool = False
    batch_invariant: bool = False
    compute_capability: int = 90
    sm_count: int = 132
    transposed: bool = False


class Config(NamedTuple):
    path: Path
    tile_m: int
    tile_n: int
    tile_k: int
    stages: int
    group_m: int
    cluster: int
    in_turn: int
    text: str


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library(CALLS, "gemm/grouped_gemm.cu", "gemm/expert_weight.cu")


def choose(library: SimtLibrary, problem: GemmProblem) -> Config:
    chosen = torch.zeros(8, dtype=torch.int64)
    text = torch.zeros(128, dtype=torch.uint8)
    library.call("choose", torch.tensor([int(x) for x in astuple(problem)]), chosen, text)
    path, *numbers = chosen.tolist()
    printed = bytes(text.tolist()).rstrip(b"\0").decode()
    return Config(Path(path), *numbers, printed)


def up_projection(layer: LayerShape, num_tokens: int, **options: Any) -> GemmProblem:
    return replace(
        GemmProblem(
            num_rows=num_tokens * layer.top_k,
            out_features=layer.ffn_size * (2 if layer.gated else 1),
            in_features=layer.hidden_size,
            num_experts=layer.num_experts,
            gated=layer.gated,
        ),
        **options,
    )


def down_projection(layer: LayerShape, num_tokens: int, **options: Any) -> GemmProblem:
    return replace(
        up_projection(layer, num_tokens),
        out_features=layer.hidden_size,
        in_features=layer.ffn_size,
        gated=False,
        gathered=False,
        **options,
    )


@pytest.mark.parametrize("layer", REAL_LAYERS, ids=str)
def test_one_token_is_decoded_and_many_are_tiled(library: SimtLibrary, layer: LayerShape) -> None:
    for projection in (up_projection, down_projection):
        assert choose(library, projection(layer, 1)).path == Path.DECODE
        assert choose(library, projection(layer, 4)).path == Path.DECODE
        assert choose(library, projection(layer, 8192)).path == Path.SM90
        assert choose(library, projection(layer, 8192, compute_capability=80)).path == Path.SM80
        assert choose(library, projection(layer, 8192, dtype=DType.FLOAT32)).path == Path.F32
        assert choose(library, projection(layer, 8192, dtype=DType.FLOAT32, allow_tf32=True)).path == Path.SM80
        assert choose(library, projection(layer, 1, dtype=DType.FLOAT32)).path == Path.DECODE
        assert choose(library, projection(layer, 8192, aligned=False)).path == Path.SM80


def test_other_architectures_run_what_all_can(library: SimtLibrary) -> None:
    for compute_capability in (80, 86, 87, 89, 100, 103, 120):
        assert choose(library, GemmProblem(compute_capability=compute_capability)).path == Path.SM80


def test_large_tiles_where_there_are_many_rows(library: SimtLibrary) -> None:
    on_a100 = {"compute_capability": 80, "sm_count": 108}
    assert choose(library, up_projection(OLMOE, 8192, **on_a100)).tile_m == 128
    assert choose(library, up_projection(OLMOE, 128, **on_a100)).tile_m == 64
    # Plenty of rows, but so few tiles that most multiprocessors would idle.
    assert choose(library, down_projection(SWITCH_BASE_8, 1024, **on_a100)).tile_m == 64
    assert choose(library, up_projection(PHIMOE, 8192)).tile_n == 256
    assert choose(library, GemmProblem(out_features=128)).tile_n == 128


def test_two_blocks_fit_where_shared_memory_is_small(library: SimtLibrary) -> None:
    for compute_capability, available in ((80, 164), (86, 100), (89, 100), (90, 228)):
        problem = up_projection(OLMOE, 8192, compute_capability=compute_capability, aligned=compute_capability != 90)
        config = choose(library, replace(problem, aligned=True, dtype=DType.FLOAT32, allow_tf32=True))
        stages = config.stages * (config.tile_m + config.tile_n) * 64
        assert 2 * (stages + 4 * (OLMOE.num_experts + 1) + 1024) <= available * 1024


def test_every_choice_is_built(library: SimtLibrary) -> None:
    rows = (1, 33, 300, 5000, 10**6, 2**31 - 1)
    sizes = ((2, 1), (130, 37), (2048, 1024), (12800, 4096))
    for num_rows, (out_features, in_features), experts, dtype, cc in product(
        rows, sizes, (1, 8, 64, 3000), DType, (80, 86, 90)
    ):
        for aligned, tf32, invariant in product((False, True), repeat=3):
            p = GemmProblem(
                num_rows, out_features, in_features, experts, dtype, True, True, aligned, tf32, invariant, cc
            )
            config = choose(library, p)
            if config.path == Path.DECODE:
                assert not invariant and aligned and in_features % 8 == 0 and experts <= MAX_EXPERTS
            else:
                assert config[1:5] in BUILT[config.path], (p, config)
                assert aligned or config.path != Path.SM90
                assert aligned or config.tile_m == 64  # the only tiles that are built for any alignment
                assert (dtype == DType.FLOAT32) == (config.tile_k == 16)


@pytest.mark.parametrize("layer", REAL_LAYERS, ids=str)
@pytest.mark.parametrize("compute_capability", [80, 90])
def test_batch_invariance_means_one_order_of_sums(
    library: SimtLibrary, compute_capability: int, layer: LayerShape
) -> None:
    for projection, dtype in product((up_projection, down_projection), (DType.BFLOAT16, DType.FLOAT32)):
        chosen = {
            choose(
                library,
                projection(layer, t, batch_invariant=True, dtype=dtype, compute_capability=compute_capability),
            )
            for t in (1, 3, 16, 100, 1000, 10000, 100000)
        }
        # The sm80 and float32 tiles all sum in the same order (their own tests say so); for wgmma that is not known.
        assert len({c.path for c in chosen}) == 1
        if compute_capability == 90 and dtype == DType.BFLOAT16:
            assert len(chosen) == 1


@pytest.mark.parametrize("in_features", [0, 2044])
def test_decoding_needs_whole_vectors(library: SimtLibrary, in_features: int) -> None:
    problem = GemmProblem(num_rows=1, in_features=in_features)
    assert choose(library, problem).path == (Path.SM90 if in_features else Path.SM80)
    assert choose(library, replace(problem, num_rows=5000)).path == (Path.SM90 if in_features else Path.SM80)


@pytest.mark.parametrize("num_rows", [1, 30, 5000])
def test_transposed_weights_are_for_the_tiled_paths(library: SimtLibrary, num_rows: int) -> None:
    problem = GemmProblem(num_rows=num_rows, gated=False, transposed=True)
    assert choose(library, problem).path == Path.SM90
    assert choose(library, replace(problem, compute_capability=80)).path == Path.SM80
    assert choose(library, replace(problem, dtype=DType.FLOAT32)).path == Path.F32


def test_too_many_experts_are_for_the_tiled_paths(library: SimtLibrary) -> None:
    assert choose(library, GemmProblem(num_rows=1, num_experts=MAX_EXPERTS)).path == Path.DECODE
    assert choose(library, GemmProblem(num_rows=1, num_experts=MAX_EXPERTS + 1)).path == Path.SM90


def test_a_choice_can_be_printed(library: SimtLibrary) -> None:
    config = choose(library, up_projection(OLMOE, 8192, compute_capability=80))
    assert config.text == "sm80 128x128x32, 4 stages, groups of 16"


def test_narrow_tiles_only_where_all_of_them_run_at_once(library: SimtLibrary) -> None:
    for num_tiles, tile_n in ((1, 128), (66, 128), (67, 256), (131, 256), (132, 256)):
        problem = GemmProblem(num_rows=128, out_features=256 * num_tiles, num_experts=1)
        assert choose(library, problem).tile_n == tile_n
    assert choose(library, GemmProblem(num_rows=10**6, out_features=128)).tile_n == 128  # half of a wide one


def test_many_rows_per_expert_share_weights_in_pairs(library: SimtLibrary) -> None:
    assert choose(library, up_projection(OLMOE, 4088)).cluster == 1  # 511 rows for each of 64 experts
    many = choose(library, up_projection(OLMOE, 4096))
    assert many[6:] == (2, 1, "sm90 128x256x64, 4 stages, groups of 16, clusters of 2, in turn")
    # The same weights by the same path for any number of rows: not in batch-invariant mode, nor elsewhere than here.
    assert choose(library, up_projection(OLMOE, 8192, batch_invariant=True)).cluster == 1
    assert choose(library, up_projection(OLMOE, 8192, compute_capability=80)).cluster == 1


# ---- the entry point ----


def run(library: SimtLibrary, p: Problem, **options: bool) -> list[list[int]]:
    """The calls that a problem leads to: path, its configuration's path, first expert, experts, first bias."""
    inputs = make_inputs(p)
    library.call("expect_calls", inputs.weight, inputs.bias, inputs.expert_offsets)
    launch(library, p, inputs, None, Settings(compute_capability=90), **options)
    count = torch.zeros(1, dtype=torch.int64)
    fields = torch.zeros(64, 5, dtype=torch.int64)
    library.call("take_calls", count, fields)
    return fields[: int(count)].tolist()


def test_problems_reach_their_path(library: SimtLibrary) -> None:
    decode, many = Problem((1, 1), 16, 16), Problem((300, 300), 16, 16)
    assert run(library, decode) == [[Path.DECODE, Path.DECODE, 0, 2, -1]]
    assert run(library, many) == [[Path.SM90, Path.SM90, 0, 2, -1]]
    assert run(library, decode, batch_invariant=True) == [[Path.SM90, Path.SM90, 0, 2, -1]]
    assert run(library, replace(many, shift=1, bias=True)) == [[Path.SM80, Path.SM80, 0, 2, 0]]
    assert run(library, replace(many, in_features=12)) == [[Path.SM80, Path.SM80, 0, 2, -1]]
    assert run(library, replace(many, padding=3)) == [[Path.SM80, Path.SM80, 0, 2, -1]]
    assert run(library, replace(decode, transposed=True)) == [[Path.SM90, Path.SM90, 0, 2, -1]]
    assert run(library, replace(many, dtype=torch.float32)) == [[Path.F32, Path.F32, 0, 2, -1]]
    assert run(library, replace(many, dtype=torch.float32), allow_tf32=True) == [[Path.SM80, Path.SM80, 0, 2, -1]]


def test_many_experts_take_several_launches(library: SimtLibrary) -> None:
    p = Problem((1,) * (2 * MAX_EXPERTS + 5), 8, 8, bias=True)
    starts = [0, MAX_EXPERTS, 2 * MAX_EXPERTS]
    assert [call[2:] for call in run(library, p)] == [
        [first, min(MAX_EXPERTS, len(p.counts) - first), first] for first in starts
    ]


def test_an_empty_problem_calls_nobody(library: SimtLibrary) -> None:
    assert run(library, Problem((0, 0), 8, 8)) == []
    assert run(library, Problem((3, 0), 0, 8)) == []


def test_no_experts_means_zeros(library: SimtLibrary) -> None:
    p = Problem((), 8, 8, unused=5)
    inputs = replace(make_inputs(p), weight=torch.zeros(0, 8, 8).bfloat16())
    library.call("expect_calls", None, None, inputs.expert_offsets)
    out = launch(library, p, inputs)
    assert torch.equal(out, torch.zeros(5, 8).bfloat16())


def test_an_upper_bound_of_tiles_holds_for_every_routing(library: SimtLibrary) -> None:
    """The arithmetic of max_row_tiles, which sizes the grid."""
    for num_rows, num_experts, tile_m in product((1, 5, 64, 65, 200), (1, 3, 90), (64, 128)):
        bound = (num_rows + min(num_experts, num_rows) * (tile_m - 1)) // tile_m
        spread = [num_rows // num_experts + (e < num_rows % num_experts) for e in range(num_experts)]
        singles = [1] * (min(num_experts, num_rows) - 1)
        for counts in (spread, [num_rows], [*singles, num_rows - len(singles)]):
            assert sum(math.ceil(c / tile_m) for c in counts) <= bound
