"""The decode path with the codes of a quantised weight, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.ops import reference
from moekernels.quantization import QuantizedWeight
from tests.simt.build import instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned
from tests.simt.gemm_problems import Problem, make_inputs
from tests.simt.params import DType
from tests.simt.quantized_problems import FORMATS, MAIN, bits_of, check, launch, quantized, weight_fields
from tests.tolerance import assert_accurate

SOURCES = (
    Path(__file__).parent / "kernels" / "quantized_gemm_decode.cu",
    "gemm/quantized_gemm_decode.cu",
    *instances("quantized_gemm_decode_"),
)
HALF_TILES = {4: ((8, 32, 2048), (8, 16, 4096), (32, 16, 2048)), 8: ((8, 32, 1024), (8, 16, 2048), (32, 16, 1024))}
FLOAT_TILES = {4: ((8, 16, 2048),), 8: ((8, 16, 1024),)}
RAGGED = (3, 0, 1, 9, 0, 40, 16)


def tiles_of(name: str, dtype: torch.dtype) -> tuple[tuple[int, int, int], ...]:
    return (FLOAT_TILES if dtype == torch.float32 else HALF_TILES)[bits_of(name)]


CASES = [
    (name, dtype, tiles)
    for name in MAIN
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for tiles in tiles_of(name, dtype)
]


@pytest.fixture(scope="module")
def built(simt: Simt) -> SimtLibrary:
    return simt.library(*SOURCES)


@pytest.fixture
def library(built: SimtLibrary) -> SimtLibrary:
    built.call("set_decode_tiles", 0, 0, 0)
    return built


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("name", "dtype", "tiles"), CASES, ids=str)
def test_every_instantiation(
    library: SimtLibrary, name: str, dtype: torch.dtype, tiles: tuple[int, int, int], gated: bool
) -> None:
    # Two rounds of K and a tail, columns that end inside a tile, experts that take one pass and several.
    library.call("set_decode_tiles", *tiles)
    in_features = tiles[2] + (192 if bits_of(name) == 4 else 176)
    check(library, Problem(RAGGED, 2 * 18, in_features, gated, True, bias=True, dtype=dtype, unused=3), name)
    assert len(library.launches) == 1
    assert "grouped_gemm_decode_kernel" in library.launches[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(library: SimtLibrary, name: str, dtype: torch.dtype) -> None:
    """Scales of every kind; the scales of an expert's last row are the last of all, and experts have rows or none."""
    for counts, out_features, in_features in (((2, 0, 1), 33, 640), ((0, 9), 6, 128), ((1,), 70, 1152)):
        check(library, Problem(counts, out_features, in_features, bias=True, dtype=dtype, unused=1), name)


COUNTS = ((0, 0, 0), (1, 0, 0), (0, 1, 1), (8,), (9,), (0, 0, 33), (1,) * 40, (0,) * 130 + (2, 0, 1))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_routings(library: SimtLibrary, name: str, counts: tuple[int, ...]) -> None:
    for tiles in HALF_TILES[bits_of(name)]:
        library.call("set_decode_tiles", *tiles)
        check(library, Problem(counts, 40, 64, unused=5), name)
        assert f"<<<({-(-40 // tiles[1])}, {min(len(counts), sum(counts) + 5)}, 1)" in library.launches[0]


@pytest.mark.parametrize(
    ("name", "in_features"),
    [*(("int4", k) for k in (32, 64, 96, 128, 160, 1056)), *(("nf4", k) for k in (64, 192, 1088)),
     *(("int8", k) for k in (16, 32, 48, 80, 1040)), ("int4-64", 192), ("fp4-128", 384), ("int8-groups", 96)],
)  # fmt: skip
def test_depths(library: SimtLibrary, name: str, in_features: int) -> None:
    """Rows that end within a piece of every lane of a chunk."""
    for dtype in (torch.bfloat16, torch.float32):
        check(library, Problem((5, 2), 20, in_features, gathered=True, dtype=dtype, padding=8), name)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_widths(library: SimtLibrary, gated: bool, width: int) -> None:
    for name in MAIN:
        for tiles in HALF_TILES[bits_of(name)]:
            library.call("set_decode_tiles", *tiles)
            check(library, Problem((9, 2), 2 * width if gated else width, 64, gated, bias=True, unused=1), name)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_epilogues(library: SimtLibrary, gated: bool, activation: str) -> None:
    for name, dtype in (("int4", torch.bfloat16), ("nf4", torch.float32)):
        for bias, scaled in ((False, True), (True, False), (True, True)):
            check(library, Problem((4, 9), 80, 64, gated, False, bias, scaled, activation, dtype), name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_orders_of_execution(library: SimtLibrary, name: str, seed: int) -> None:
    problem = Problem((35, 3, 0, 1), 72, 384, gated=True, gathered=True, activation="silu")
    first, _ = check(library, problem, name)
    again, _ = check(library, problem, name, settings=Settings(seed=seed, compute_capability=80))
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_all_tiles_give_the_same_bits(library: SimtLibrary, name: str, dtype: torch.dtype) -> None:
    """The order of the sum over K depends on K alone: not on the tile, and not on the other rows."""
    problem = Problem((30, 2), 36, 2240, gated=True, bias=True, activation="silu", dtype=dtype)
    inputs = make_inputs(problem)
    weight = quantized(inputs, name)
    results = []
    for tiles in HALF_TILES[bits_of(name)]:
        library.call("set_decode_tiles", *tiles)
        results.append(launch(library, problem, inputs, weight))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    few = replace(problem, counts=(1, 1))
    alone = replace(inputs, rows=inputs.rows[29:31].clone(), expert_offsets=torch.tensor([0, 1, 2]).int())
    assert torch.equal(launch(library, few, alone, weight), results[0][29:31])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_those_that_dequantize_gives(library: SimtLibrary, name: str, dtype: torch.dtype) -> None:
    """Rows of the identity give the weight itself, so that few rows and many meet the same one."""
    problem = Problem((128,), 24, 128, dtype=dtype)
    inputs = replace(make_inputs(problem), rows=torch.eye(128, dtype=dtype))
    weight = quantized(inputs, name)
    actual = launch(library, problem, inputs, weight).T
    expected = weight.dequantize(dtype)[0]
    if name == "int8":  # a scale has two factors, which are multiplied in another order
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(actual, expected)


def test_a_piece_of_a_stack(library: SimtLibrary) -> None:
    """Experts that are not neighbours, as views of a stack are."""
    problem = Problem((2, 0, 3), 40, 384, bias=True)
    inputs = make_inputs(problem)
    twice = replace(inputs, weight=inputs.weight.repeat_interleave(2, 0))
    for name in FORMATS:
        expected = launch(library, problem, inputs, quantized(inputs, name))
        assert torch.equal(launch(library, problem, inputs, quantized(twice, name)[::2]), expected)


def test_bad_offsets_stay_inside_the_tensors(library: SimtLibrary) -> None:
    problem = Problem((10, 10), 40, 64, gathered=True)
    inputs = make_inputs(problem)
    for name in ("int4", "nf4-nested", "int8"):
        weight = quantized(inputs, name)
        for offsets in ([-5, 10, 2**31 - 1], [100, 7, -3], [0, 30, 15], [2**31 - 1, -(2**31), 2**31 - 1], [5, 5, 5]):
            broken = replace(inputs, expert_offsets=torch.tensor(offsets, dtype=torch.int32))
            launch(library, problem, broken, weight)  # the runtime finds any access outside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_that_are_not_finite_stay_where_they_are(library: SimtLibrary, dtype: torch.dtype) -> None:
    problem = Problem((3, 5), 33, 64, dtype=dtype, padding=8)  # behind each row lie NaN
    inputs = make_inputs(problem)
    inputs.rows[1, 3] = float("nan")
    inputs.rows[4, 63] = float("inf")
    inputs.weight[1, 7, 5] = float("nan")
    for name in FORMATS:
        if name in ("fp4-128", "nf4-nested"):  # no block of 128; nested scales carry a NaN into others
            continue
        weight = quantized(inputs, name)
        truth = replace(inputs, weight=weight.dequantize(dtype)).reference(problem)
        actual = launch(library, problem, inputs, weight)
        untouched = torch.ones(8, 33, dtype=torch.bool)
        untouched[[1, 4]] = False
        untouched[3:, 7] = False
        assert not actual[~untouched].isfinite().any()
        torch.testing.assert_close(actual[untouched], truth[untouched], rtol=1e-2, atol=1e-2)


def test_what_it_cannot_serve_is_an_error(library: SimtLibrary) -> None:
    problem = Problem((5, 6), 64, 64)
    inputs = make_inputs(problem)
    int4, nf4, int8, nested = (quantized(inputs, name) for name in ("int4", "nf4", "int8", "nf4-nested"))
    table = weight_fields(nf4)["table"]
    unaligned = torch.zeros(2 * 64 * 32 + 8, dtype=torch.uint8)[8:].view(2, -1)
    refused: list[tuple[QuantizedWeight, dict[str, Any]]] = [
        (int4, {"table": table}),
        (int4, {"scales_dtype": DType.FLOAT32, "scales": torch.zeros(2, 128)}),
        (nf4, {"scales_dtype": DType.FLOAT16}),
        (int8, {"map": weight_fields(nested)["map"]}),
        (int4, {"codes": unaligned}),
        (int4, {"codes_stride": 2056}),
    ]
    for weight, fields in refused:
        with pytest.raises(SimtError, match=r"cudaError_t 1$"):
            launch(library, problem, inputs, weight, **fields)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, problem, inputs, int8, int8_rows=True)
    odd = replace(problem, in_features=56)
    shorter = replace(inputs, rows=inputs.rows[:, :56].contiguous(), weight=inputs.weight[..., :56].contiguous())
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, odd, shorter, quantized(shorter, "int8"))
    library.call("set_decode_tiles", 16, 32, 1024)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        launch(library, problem, inputs, int4)


def test_the_usual_tiles_are_built(library: SimtLibrary) -> None:
    chosen = set()
    for name, dtype in ((n, d) for n in MAIN for d in (torch.bfloat16, torch.float32)):
        for num_rows, num_experts, out_features in ((8, 64, 2048), (2, 128, 2048), (32, 1, 4096), (128, 64, 2048)):
            config = poisoned((3,), torch.int32)
            library.call("usual_tiles", config, num_rows, num_experts, out_features, DType.of(dtype), bits_of(name))
            assert tuple(config.tolist()) in tiles_of(name, dtype)
            chosen.add((dtype, bits_of(name), tuple(config.tolist())))
    assert len(chosen) == 2 * (3 + 1)  # each of them is somebody's


def test_launches_in_a_row_overlap(library: SimtLibrary) -> None:
    """Each reads what the one before has just written, with no plain read of it as constant."""
    problem = Problem((2, 1), 128, 128, dtype=torch.bfloat16)
    inputs = make_inputs(problem)
    for name in FORMATS:
        weight = quantized(inputs, name)
        values = weight.dequantize(torch.float64), weight.dequantize()
        with library.chain():
            for seed in range(3):
                out = launch(library, problem, inputs, weight, Settings(seed=seed, compute_capability=90))
                assert library.launches[-1].endswith("overlapped")
                truth = reference.grouped_gemm(inputs.rows.double(), values[0], inputs.expert_offsets)
                assert_accurate(out, truth, reference.grouped_gemm(inputs.rows, values[1], inputs.expert_offsets))
                inputs = replace(inputs, rows=out)
