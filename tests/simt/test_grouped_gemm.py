"""The grouped GEMM as its callers see it: the entry point with all paths behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekernels.ops import Swiglu
from tests.simt.build import CUDA_SOURCES, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary
from tests.simt.gemm_problems import Problem, check, experts, launch, make_inputs
from tests.tolerance import assert_accurate

AMPERE = Settings(compute_capability=80)
HOPPER = Settings(compute_capability=90)
FEW = (1, 0, 3, 1, 0, 2)
MANY = (70, 0, 3, 150, 0, 1)


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    sources = sorted(path for path in (CUDA_SOURCES / "gemm").glob("*.cu") if not path.name.startswith("quantized_"))
    return simt.library(*sources, *instances("grouped_gemm_"))


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_both_projections(
    library: SimtLibrary, shift: int, counts: tuple[int, ...], dtype: torch.dtype, settings: Settings
) -> None:
    up = Problem(counts, 80, 72, gated=True, gathered=True, activation="silu", dtype=dtype, unused=4, shift=shift)
    check(library, up, settings=settings)
    if shift or counts == MANY:
        tiled = "f32" if dtype == torch.float32 else "sm80" if shift or settings is AMPERE else "sm90"
        assert f"grouped_gemm_{tiled}_kernel" in library.launches[0]
    else:
        assert "decode" in library.launches[0]
    down = Problem(counts, 72, 40, bias=True, scaled=True, dtype=dtype, unused=4, shift=shift)
    check(library, down, settings=settings)


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
def test_transposed_weights(
    library: SimtLibrary, shift: int, counts: tuple[int, ...], dtype: torch.dtype, settings: Settings
) -> None:
    p = Problem(counts, 72, 40, transposed=True, scaled=True, dtype=dtype, unused=4, shift=shift)
    check(library, p, settings=settings)
    tiled = "f32" if dtype == torch.float32 else "sm80" if shift or settings is AMPERE else "sm90"
    assert f"grouped_gemm_{tiled}_kernel" in library.launches[0]


@pytest.mark.parametrize(
    "p",
    [
        Problem((2, 0, 3), 72, 40, activation="relu2"),
        Problem((2, 0, 3), 80, 40, activation=Swiglu(limit=2.0), gated=True),
        Problem((2, 0, 3), 72, 40, transposed=True, bias=True),
    ],
    ids=["relu2", "swiglu", "transposed bias"],
)
def test_what_epilogues_cannot_do_is_an_error(library: SimtLibrary, p: Problem) -> None:
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):  # cudaErrorInvalidValue
        check(library, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_experts_than_one_launch_takes(library: SimtLibrary, dtype: torch.dtype) -> None:
    counts = (2, *(e % 2 for e in range(1030)), 3)
    check(library, Problem(counts, 8, 8, bias=True, activation="relu", dtype=dtype, unused=3), settings=AMPERE)
    assert len(library.launches) == 2


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_consumer_cards(library: SimtLibrary, capability: int, dtype: torch.dtype, transposed: bool) -> None:
    """100 KB of shared memory for two blocks of a multiprocessor, each with 1 KB of the system's."""
    settings = Settings(compute_capability=capability)
    for counts in (FEW, MANY, (150, 170)):
        gated = not transposed
        p = Problem(counts, 256, 72, gated, gathered=gated, scaled=True, dtype=dtype, unused=4, transposed=transposed)
        check(library, p, settings=settings)
        (smem,) = (int(line.split("), ")[-1].split(">>>")[0]) for line in library.launches)
        assert 2 * (smem + 1024) <= 100 * 1024, library.launches
        assert "sm90" not in library.launches[0]


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(library: SimtLibrary, dtype: torch.dtype, settings: Settings) -> None:
    """A row's output has the same bits alone, among few and among many."""
    many = Problem((140, 40), 200, 72, gated=True, activation="silu", dtype=dtype)
    inputs = make_inputs(many)
    expected = launch(library, many, inputs, settings=settings, batch_invariant=True)
    for kept in ([0], [3, 139], list(range(100)), [150], [0, 140, 179]):
        counts = (sum(row < 140 for row in kept), sum(row >= 140 for row in kept))
        some = replace(
            inputs, rows=inputs.rows[kept].clone(), expert_offsets=torch.tensor([0, *counts]).cumsum(0).int()
        )
        actual = launch(library, replace(many, counts=counts), some, settings=settings, batch_invariant=True)
        assert torch.equal(actual, expected[kept])


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
def test_tf32_only_where_allowed(library: SimtLibrary, settings: Settings) -> None:
    p = Problem(MANY, 40, 72, dtype=torch.float32)
    inputs = make_inputs(p)
    truth, plain = inputs.to(torch.float64).reference(p), inputs.reference(p)
    exact = launch(library, p, inputs, settings=settings)
    rough = launch(library, p, inputs, settings=settings, allow_tf32=True)
    assert_accurate(exact, truth, plain)
    error = (rough.double() - truth).abs().max() / truth.abs().max()
    assert 1e-5 < error < 2e-3


# ---- weights in parts ----


@pytest.mark.parametrize("settings", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_table_of_weights(
    library: SimtLibrary, parts: int, shift: int, counts: tuple[int, ...], dtype: torch.dtype, settings: Settings
) -> None:
    up = Problem(
        counts, 80, 72, gated=True, gathered=True, bias=True, activation="silu", dtype=dtype, unused=4, shift=shift,
        parts=parts,
    )  # fmt: skip
    check(library, up, settings=settings)
    assert "store_table_kernel" in library.launches[0] and len(library.launches) == 2
    few = counts == FEW and not shift
    tiled = "f32" if dtype == torch.float32 else "sm80"
    assert f"grouped_gemm_{'decode' if few else tiled}_kernel" in library.launches[1]
    check(library, replace(up, gated=False, gathered=False, activation="none", scaled=True), settings=settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "shifted"])
@pytest.mark.parametrize("parts", [1, 2, 3, 36])
def test_a_table_of_transposed_weights(library: SimtLibrary, parts: int, shift: int, dtype: torch.dtype) -> None:
    check(library, Problem(MANY, 40, 72, transposed=True, scaled=True, dtype=dtype, shift=shift, parts=parts))


@pytest.mark.parametrize("parts", [3, 5, 10])
def test_parts_that_end_anywhere(library: SimtLibrary, parts: int) -> None:
    for counts in (FEW, MANY):
        check(library, Problem(counts, 270, 72, bias=True, activation="gelu", parts=parts, unused=2))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_table_of_more_than_one_launch(library: SimtLibrary, gated: bool) -> None:
    counts = (2, *(e % 2 for e in range(1030)), 3)
    check(library, Problem(counts, 8, 8, bias=True, gated=gated, activation="relu", unused=3, parts=2))
    assert sum("store_table_kernel" in launch for launch in library.launches) == -(-2 * len(counts) // 128)


def test_biases_in_parts_beside_a_stack(library: SimtLibrary) -> None:
    for settings in (AMPERE, HOPPER):
        p = Problem(MANY, 80, 72, bias=True, gated=True, activation="silu")
        inputs = make_inputs(p)
        assert inputs.bias is not None
        fields = {**experts(p, inputs), "bias": None, "bias_parts": list(inputs.bias)}
        actual = launch(library, p, inputs, settings=settings, fields=fields)
        assert torch.equal(actual, launch(library, p, inputs, settings=settings))
