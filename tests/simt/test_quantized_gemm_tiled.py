"""The grouped GEMM of many rows with the codes of a quantised weight, or with its transpose, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.simt import gemm_problems
from tests.simt.build import KERNELS, instances
from tests.simt.device import Settings, Simt, SimtError, Timing
from tests.simt.gemm_problems import Inputs, Problem, Tiles, make_inputs
from tests.simt.params import DType
from tests.simt.quantized_problems import FORMATS, MAIN, check, launch, quantized, weight_fields

CODES = ("gemm/quantized_gemm_sm80.cu", *instances("quantized_gemm_sm80_"))
PLAIN = ("gemm/grouped_gemm_sm80.cu", *instances("grouped_gemm_sm80_"))
SMALL = Tiles(64, 4)
LARGE = Tiles(128, 4)
SHALLOW = Tiles(128, 3)
ALL_TILES = (SMALL, LARGE, SHALLOW)
TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")
RAGGED = (130, 0, 1, 37, 0, 64)


class Kernels:
    """That of codes, and that of plain weights, which it must equal to the bit."""

    def __init__(self, simt: Simt) -> None:
        self.codes = simt.library(KERNELS / "quantized_gemm_sm80.cu", *CODES)
        self.plain = simt.library(KERNELS / "grouped_gemm_path.cu", *PLAIN, defines=("PATH=sm80",))

    def set(self, tiles: Tiles) -> None:
        self.codes.call("set_config", tiles.tile_m, tiles.stages, tiles.group_m)

    def check(
        self, p: Problem, name: str, tiles: Tiles = SMALL, settings: Settings | None = None, seed: int = 1
    ) -> Tensor:
        """Runs a problem, compares it with the definition and with the plain kernel, and returns the output."""
        self.set(tiles)
        p = replace(p, padding=p.padding + -p.in_features % 8)  # so that rows are aligned
        actual, weight = check(self.codes, p, name, settings, seed)
        (kernel,) = self.codes.launches
        assert "quantized_gemm_sm80_kernel" in kernel
        whole = replace(make_inputs(p, seed), weight=weight.dequantize(p.dtype))
        small = tiles if whole.weight.stride(1) % 8 == 0 else SMALL  # that of plain weights of any alignment
        assert torch.equal(actual, gemm_problems.launch(self.plain, p, whole, small))
        return actual


@pytest.fixture(scope="module")
def kernels(simt: Simt) -> Kernels:
    return Kernels(simt)


@pytest.mark.parametrize("tiles", ALL_TILES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "gated", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_every_instantiation(kernels: Kernels, name: str, dtype: torch.dtype, kind: str, tiles: Tiles) -> None:
    # Columns and depth end inside a tile.
    if kind == "transposed":
        p = Problem(RAGGED, 192, 150, transposed=True, scaled=True, dtype=dtype, unused=3)
    else:
        gated = kind == "gated"
        p = Problem(RAGGED, 2 * 84, 192, gated=gated, gathered=gated, bias=True, dtype=dtype, unused=3)
    kernels.check(p, name, tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    """Scales of every kind; the scales of an expert's last row are the last of all, and experts have rows or none."""
    for counts, out_features, in_features in (((2, 0, 70), 33, 640), ((0, 9), 6, 128), ((65,), 130, 1152)):
        p = Problem(counts, out_features, in_features, gathered=True, dtype=dtype, unused=1)
        kernels.check(replace(p, bias=True), name)
        kernels.check(replace(p, out_features=in_features, in_features=out_features, transposed=True), name)


@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (64,), (65,), (0, 0, 200), (1,) * 40, (0,) * 130 + (2, 0, 1)], ids=str
)
@pytest.mark.parametrize("name", MAIN)
def test_routings(kernels: Kernels, name: str, counts: tuple[int, ...]) -> None:
    kernels.check(Problem(counts, 72, 64, unused=5), name)
    kernels.check(Problem(counts, 64, 72, gathered=True, transposed=True, unused=5), name)


LENGTHS = [
    *(("int4", k) for k in (32, 64, 96, 128, 160, 288)), *(("nf4", k) for k in (64, 192)), ("int4-64", 192),
    *(("int8", k) for k in (16, 32, 48, 80, 112, 272)), ("fp4-128", 384), ("int8-groups", 96), ("nf4-nested", 160),
]  # fmt: skip


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_rows_of_a_weight_of_any_length(kernels: Kernels, name: str, length: int) -> None:
    """Which is the depth, or, transposed, the width. One length after the other meets the next tiles."""
    tiles = ALL_TILES[LENGTHS.index((name, length)) % len(ALL_TILES)]
    kernels.check(Problem((70, 5), 40, length, padding=8), name, tiles)
    kernels.check(Problem((70, 5), length, 40, transposed=True, padding=8), name, tiles)


@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("name", MAIN)
def test_weights_of_any_number_of_rows(kernels: Kernels, name: str, count: int) -> None:
    for gated in (False, True):
        kernels.check(Problem((9, 66), 2 * count if gated else count, 64, gated=gated, bias=True), name)
    kernels.check(Problem((9, 66), 64, count, transposed=True), name)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_epilogues(kernels: Kernels, gated: bool, activation: str) -> None:
    for bias, scaled in ((False, True), (True, False), (True, True)):
        p = Problem((20, 90), 136, 64, gated=gated, bias=bias, scaled=scaled, activation=activation)
        kernels.check(p, "nf4", LARGE)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["int4", "nf4-nested", "int8"])
def test_orders_of_execution(kernels: Kernels, name: str, seed: int, transposed: bool, timing: Timing) -> None:
    # One block takes several tiles; the rings wrap.
    settings = Settings(seed=seed, timing=timing, sm_count=1, compute_capability=80)
    p = Problem((150, 3, 0, 129), 136, 224, gated=True, gathered=True, bias=True, activation="silu")
    if transposed:
        p = Problem((70, 3, 0), 160, 168, transposed=True, gathered=True)
    tiles = ALL_TILES[(seed + TIMINGS.index(timing)) % len(ALL_TILES)]  # each twice
    kernels.check(p, name, tiles, settings, seed=seed)


@pytest.mark.parametrize("name", MAIN)
def test_all_tiles_sum_in_the_same_order(kernels: Kernels, name: str) -> None:
    for p in (Problem(RAGGED, 136, 192, gated=True, activation="silu"), Problem(RAGGED, 192, 72, transposed=True)):
        results = [kernels.check(p, name, tiles) for tiles in (*ALL_TILES, Tiles(64, 4, 16))]
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_piece_of_a_stack(kernels: Kernels) -> None:
    """Experts that are not neighbours, as views of a stack are."""
    kernels.set(SMALL)
    for p in (Problem((2, 0, 3), 40, 384, bias=True), Problem((2, 0, 3), 384, 40, transposed=True)):
        inputs = make_inputs(p)
        twice = replace(inputs, weight=inputs.weight.repeat_interleave(2, 0))
        for name in FORMATS:
            expected = launch(kernels.codes, p, inputs, quantized(inputs, name))
            assert torch.equal(launch(kernels.codes, p, inputs, quantized(twice, name)[::2]), expected)


@pytest.mark.parametrize("offsets", [[-5, 40, 2**31 - 1], [100, 7, -3], [0, 90, 80], [2**31 - 1, -(2**31), 2**31 - 1]])
def test_bad_offsets_stay_inside_the_tensors(kernels: Kernels, offsets: list[int]) -> None:
    kernels.set(SMALL)
    for p in (Problem((40, 40), 40, 64, gathered=True), Problem((40, 40), 64, 40, transposed=True)):
        broken = replace(make_inputs(p), expert_offsets=torch.tensor(offsets, dtype=torch.int32))
        for name in ("int4", "nf4-nested", "int8"):
            launch(kernels.codes, p, broken, quantized(broken, name))  # the runtime finds any access outside


@pytest.mark.parametrize("name", ["int4", "nf4", "int8", "int8-groups"])
def test_values_that_are_not_finite_stay_where_they_are(kernels: Kernels, name: str) -> None:
    kernels.set(SMALL)
    for transposed in (False, True):
        # Depth ends inside a step, and behind each row lie NaN.
        p = Problem((3, 66), 33, 80 if name == "int8" else 64, padding=8)
        if transposed:
            p = Problem((3, 66), 128, 40, transposed=True, padding=8)
        inputs = make_inputs(p)
        inputs.rows[1, 3] = float("nan")
        inputs.rows[4, 39] = float("inf")
        inputs.weight[1, 7, 5] = float("nan")
        weight = quantized(inputs, name)
        whole = weight.dequantize(p.dtype)
        expected = replace(inputs, weight=whole).reference(p)
        touched = torch.zeros(69, p.width, dtype=torch.bool)
        touched[[1, 4]] = True
        touched[3:] |= whole[1].isnan().any(0 if transposed else 1)
        actual = launch(kernels.codes, p, inputs, weight)
        assert 0 < touched.sum() < touched.numel()
        assert not actual[touched].isfinite().any()
        torch.testing.assert_close(actual[~touched], expected[~touched], rtol=1e-2, atol=1e-2)


def test_a_scale_that_is_infinite(kernels: Kernels) -> None:
    """What lies behind the end of its row does not make infinite sums NaN."""
    p = Problem((5,), 8, 48)
    inputs = replace(make_inputs(p), rows=torch.ones(5, 48, dtype=torch.bfloat16))
    inputs.weight[0, 3] = 1.0
    weight = quantized(inputs, "int8")
    weight.parts["SCB"][0, 3] = float("inf")
    kernels.set(SMALL)
    actual = launch(kernels.codes, p, inputs, weight)
    assert (actual[:, 3] == float("inf")).all()
    assert actual[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_what_it_cannot_serve_is_an_error(kernels: Kernels) -> None:
    problem = Problem((5, 6), 64, 64)
    inputs = make_inputs(problem)
    int4, nf4, int8, nested = (quantized(inputs, name) for name in ("int4", "nf4", "int8", "nf4-nested"))
    unaligned = torch.zeros(2 * 64 * 32 + 8, dtype=torch.uint8)[8:].view(2, -1)

    def refuses(p: Problem, inputs: Inputs, weight: object, **options: object) -> None:
        with pytest.raises(SimtError, match=r"cudaError_t 1$"):
            launch(kernels.codes, p, inputs, weight, **options)  # type: ignore[arg-type]

    kernels.set(SMALL)
    refuses(problem, inputs, int4, table=weight_fields(nf4)["table"])
    refuses(problem, inputs, int4, scales_dtype=DType.FLOAT32, scales=torch.zeros(2, 128))
    refuses(problem, inputs, nf4, scales_dtype=DType.FLOAT16)
    refuses(problem, inputs, int8, map=weight_fields(nested)["map"])
    refuses(problem, inputs, int4, codes=unaligned)
    refuses(problem, inputs, int4, codes_stride=2056)
    refuses(problem, inputs, int8, int8_rows=True)
    for changed in (replace(problem, padding=4), replace(problem, shift=1), replace(problem, dtype=torch.float32)):
        refuses(changed, make_inputs(changed), int4)
    odd = Problem((5, 6), 64, 56)
    refuses(odd, make_inputs(odd), quantized(make_inputs(odd), "int8"))
    for tiles in (Tiles(96, 4), Tiles(64, 3), Tiles(128, 5)):
        kernels.set(tiles)
        refuses(problem, inputs, int4)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_what_is_chosen_is_built(kernels: Kernels, transposed: bool) -> None:
    """Few rows are decoded, but not for gradients; in float32 all are, and under `batch_invariant` none."""
    sm80, decode = 1, 3

    def chosen(
        num_rows: int, num_experts: int = 64, dtype: DType = DType.BFLOAT16, invariant: bool = False, gpu: int = 90
    ) -> tuple[int, ...]:
        config = torch.zeros(3, dtype=torch.int32)
        kernels.codes.call("choose", config, num_rows, num_experts, int(dtype), int(transposed), int(invariant), gpu)
        return tuple(config.tolist())

    for few in (1, 32, 256):
        assert chosen(few, invariant=True) == (sm80, 64, 4)
        assert chosen(few)[0] == (sm80 if transposed else decode)
    for rows in (257, 64 * 64):
        assert chosen(rows) == (sm80, 64, 4)
    for many in (64 * 65, 10**6):
        assert chosen(many) == chosen(many, invariant=True) == chosen(many, gpu=80) == (sm80, *LARGE[:2])
        assert chosen(many, gpu=86) == chosen(many, gpu=89) == (sm80, *SHALLOW[:2])
        if not transposed:
            assert chosen(many, dtype=DType.FLOAT32)[0] == decode


def test_the_entry(simt: Simt) -> None:
    """Few rows are decoded, many and those of gradients tiled; and what there is without experts, or rows."""
    decode = ("gemm/quantized_gemm_decode.cu", *instances("quantized_gemm_decode_"))
    entry = simt.library("gemm/quantized_gemm.cu", *decode, *CODES)
    for p, kernel in (
        (Problem((3, 2), 40, 128, unused=1), "grouped_gemm_decode_kernel"),
        (Problem((0, 70), 40, 128, unused=1), "quantized_gemm_sm80_kernel"),
        (Problem((0, 70), 40, 128, dtype=torch.float32), "grouped_gemm_decode_kernel"),
        (Problem((3, 2), 128, 40, transposed=True), "quantized_gemm_sm80_kernel"),
        (Problem((300, 2, 300), 128, 64), "quantized_gemm_sm80_kernel"),
    ):
        check(entry, p, "int4", Settings(sm_count=2))
        assert kernel in entry.launches[0]
    nothing = Problem((0, 0), 40, 128)
    inputs = make_inputs(nothing)
    launch(entry, nothing, inputs, quantized(inputs, "int4"))
    assert entry.launches == []
    nobody = Problem((), 40, 128, unused=3)
    alone = replace(inputs, rows=torch.ones(3, 128).bfloat16(), expert_offsets=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(launch(entry, nobody, alone, quantized(inputs, "int4")), torch.zeros(3, 40).bfloat16())
    for p in (
        Problem((0, 1), 40, 128, activation="relu2"),
        Problem((9,), 64, 40, transposed=True, dtype=torch.float32),
    ):
        with pytest.raises(SimtError, match=r"cudaError_t 1$"):  # there is no kernel for it
            launch(entry, p, make_inputs(p), quantized(make_inputs(p), "int4"))
