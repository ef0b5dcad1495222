"""Programmatic dependent launch: a kernel starts while the one before it still runs, and nobody may notice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekernels.ops import Plan, reference
from tests.simt.build import KERNELS, instances
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned
from tests.simt.gemm_problems import Inputs, Problem, launch
from tests.simt.hardware import HardwareLibrary, Machine
from tests.simt.test_permute import run_permute, run_unpermute
from tests.simt.test_plan import run_plan
from tests.simt.test_route import run_route
from tests.tolerance import assert_accurate

HOPPER = Settings(compute_capability=90)


@pytest.fixture(scope="module")
def overlap(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "overlap.cu")


def _add_two(
    overlap: SimtLibrary | HardwareLibrary, second_overlaps: bool, fault: int, settings: Settings = HOPPER
) -> None:
    values = torch.arange(128, dtype=torch.int32).view(32, 4)
    between, out = poisoned((32, 4), torch.int32), poisoned((32, 4), torch.int32)
    overlap.call("two_launches", values, between, out, int(second_overlaps), fault, settings=settings)
    assert torch.equal(out, values + torch.tensor([2, 0, 0, 0], dtype=torch.int32))


@pytest.mark.parametrize("seed", range(2))
def test_launches_that_wait_may_overlap(machine: Machine, seed: int) -> None:
    library = machine("overlap.cu")
    _add_two(library, True, 0, Settings(seed=seed))
    if isinstance(library, SimtLibrary):
        assert [line.endswith("overlapped") for line in library.launches] == [True, True]


def test_older_devices_overlap_nothing(overlap: SimtLibrary) -> None:
    _add_two(overlap, True, 0, Settings(compute_capability=89))
    assert not any("overlapped" in line for line in overlap.launches)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "touches global memory before griddepcontrol.wait"),
        (2, "exits without griddepcontrol.wait"),
        (3, "a launch that may still run wrote there"),
        (4, "a launch that may still run wrote there"),
    ],
)
def test_faults_of_overlap_are_found(overlap: SimtLibrary, fault: int, message: str) -> None:
    with pytest.raises(SimtError, match=message):
        _add_two(overlap, True, fault)


def test_what_a_launch_before_has_written_is_constant_once_it_has_ended(overlap: SimtLibrary) -> None:
    _add_two(overlap, False, 3)


def test_a_chain_goes_on_over_calls(overlap: SimtLibrary) -> None:
    values, between, out = torch.zeros(32, 4, dtype=torch.int32), *(poisoned((32, 4), torch.int32) for _ in range(2))
    overlap.call("first", values, between)
    overlap.call("second", between, out, 3)  # as if the device had been waited for
    with overlap.chain():
        overlap.call("first", values, between)
        with pytest.raises(SimtError, match="a launch that may still run wrote there"):
            overlap.call("second", between, out, 3)


def test_the_switch(overlap: SimtLibrary, simt: Simt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the library reads the setting anew."""
    copy = tmp_path / "copy.so"
    shutil.copy(overlap.path, copy)
    monkeypatch.setenv("MOEKERNELS_CUDA_OVERLAP", "off")
    alone = simt.load(copy)
    _add_two(alone, True, 0)
    assert len(alone.launches) == 2 and not any("overlapped" in line for line in alone.launches)


# ---- our ops, one after the other, at few tokens ----


@pytest.fixture(scope="module")
def layer(simt: Simt) -> SimtLibrary:
    """Every kernel of a layer's forward pass for few tokens."""
    library = simt.library(
        KERNELS / "grouped_gemm_decode.cu", "gemm/grouped_gemm_decode.cu", *instances("grouped_gemm_decode_"),
        "routing/route.cu", "routing/plan.cu", "rows/permute.cu", "rows/unpermute.cu",
    )  # fmt: skip
    library.call("set_decode_tiles", 0, 0, 0)
    return library


HIDDEN, FFN, EXPERTS, TOP_K = 72, 40, 5, 2


def _gemm(
    layer: SimtLibrary, rows: Tensor, weight: Tensor, plan: Plan, num_rows: int, gathered: bool, settings: Settings
) -> Tensor:
    """silu(gate) * value over packed rows, or over rows found through the plan."""
    counts = tuple(plan.expert_offsets.diff().tolist())
    p = Problem(counts, *weight.shape[1:], gated=True, gathered=gathered, activation="silu",
                unused=num_rows - sum(counts))  # fmt: skip
    inputs = Inputs(rows, weight, plan.expert_offsets, None, None, plan.token_of_row if gathered else None)
    return launch(layer, p, inputs, settings=settings)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "permuted"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
def test_layers_of_few_tokens(layer: SimtLibrary, num_tokens: int, gathered: bool) -> None:
    """Three layers in a row, each reading what the one before has just written, into the same memory again."""
    torch.manual_seed(num_tokens)
    weight = torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN).bfloat16() / 8
    hidden = torch.randn(num_tokens, HIDDEN).bfloat16()
    launches: list[str] = []
    with layer.chain():
        for seed in range(3):
            settings = Settings(seed=seed, compute_capability=90)
            logits = hidden[:, :EXPERTS].float().contiguous()
            weights, expert_ids = run_route(layer, logits, TOP_K, settings=settings)
            launches += layer.launches
            plan = run_plan(layer, expert_ids, EXPERTS, settings=settings)
            launches += layer.launches
            rows = hidden
            if not gathered:
                rows = run_permute(layer, hidden, plan.token_of_row, settings=settings)
                launches += layer.launches
            activated = _gemm(layer, rows, weight, plan, num_tokens * TOP_K, gathered, settings)
            launches += layer.launches
            out = run_unpermute(layer, activated, plan.row_of_slot, weights, settings=settings)
            launches += layer.launches

            truth = reference.grouped_gemm(
                hidden.double(), weight.double(), plan.expert_offsets, activation="silu", gated=True,
                token_of_row=plan.token_of_row,
            )  # fmt: skip
            plain = reference.grouped_gemm(
                hidden, weight, plan.expert_offsets, activation="silu", gated=True, token_of_row=plan.token_of_row
            )
            assert_accurate(activated, truth, plain)
            mixed = reference.unpermute(activated.double(), plan.row_of_slot, weights)
            assert_accurate(out, mixed, mixed.bfloat16())
            hidden = out
    assert launches and all(line.endswith("overlapped") for line in launches)
