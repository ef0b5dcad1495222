"""What goes wrong among processes: every rank is told, in time, what and where."""

from __future__ import annotations

import multiprocessing
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from tests.distributed import faults
from tests.processes import run_processes

TIMEOUT = 5.0

#: What both ranks are told, as a regular expression.
TOLD = {
    "dense": r"ValueError: .*M2M100ForConditionalGeneration has no sparse layer",
    "no mesh": r"ValueError: .*mesh must be a DeviceMesh of one dimension, got ProcessGroup",
    "two dimensions": r'ValueError: .*must have one dimension, such as mesh\["ep"\], got 2',
    "another device": r"ValueError: .*is on cpu, but the mesh is of cuda devices",
    "misspelt": r"ValueError: .*'frist' is no sparse layer; near names: first",
    "misspelt on one": r"ValueError: .*'secnod' is no sparse layer; near names: second",
    "misspelt dispatch": r"ValueError: .*dispatch must be 'all_to_all' or 'all_reduce', got 'alltoall'",
    "misspelt sums": r"ValueError: .*sums must be 'exact' or 'partial', got 'half'",
    "no rows": r"ValueError: .*rows_per_rank must be a positive number or None, got 0",
    "rows for nothing": r"ValueError: .*rows_per_rank is for dispatch 'all_to_all'",
    "other rows": r"ValueError: .*rank 1 of the mesh has another model.*rows_per_rank=9.*rows_per_rank=8",
    "few experts": r"ValueError: .*has 1 experts, fewer than the 2 ranks",
    "another model": r"ValueError: .*rank 1 of the mesh has another model than rank 0: SparseMLP",
    "other options": r"ValueError: .*rank 1 of the mesh has another model.*all_reduce.*all_to_all",
    "twice": r"ValueError: .*is a DTensor already",
    "unreadable": r"(CommunicationError: from_pretrained failed on rank 1|CheckpointNotFoundError): .*elsewhere",
    "dispatch without mesh": r"ValueError: .*dispatch without a mesh",
    "another call": r"CommunicationError: rank \d of 2.*numbers of tokens.*rank [01] called it otherwise",
    "still well": "nothing",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_processes(faults.run, 2, str(tmp_path_factory.mktemp("faults")))


@pytest.mark.parametrize("case", TOLD)
def test_every_rank_is_told(found: list[dict[str, str]], case: str) -> None:
    for rank in found:
        assert re.match(TOLD[case], rank[case]), rank[case]


def test_every_case_is_looked_at(found: list[dict[str, str]]) -> None:
    assert set(found[0]) == set(TOLD)


HOW = ("killed", "silent")


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of three left behind, of which rank 1 is gone; all at the same time, as they mostly wait."""
    folder = tmp_path_factory.mktemp("gone")
    context = multiprocessing.get_context("forkserver")
    workers = {
        (how, rank): context.Process(target=_process, args=(rank, folder, how)) for how in HOW for rank in range(3)
    }
    for worker in workers.values():
        worker.start()
    for (_, rank), worker in workers.items():
        if rank != 1:
            worker.join(timeout=90)
    for worker in workers.values():
        worker.kill()
    return folder


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("how", HOW)
def test_a_rank_that_is_gone(gone: Path, how: str, rank: int) -> None:
    """The others end with an error that names them and the operation, and do not hang."""
    seconds, _, message = (gone / f"{how}-{rank}").read_text().partition(" ")
    assert re.search(rf"rank {rank} of 3 of the expert-parallel mesh, in .*: another rank has ended", message)
    assert float(seconds) < 3 * TIMEOUT


@pytest.mark.parametrize("how", HOW)
def test_the_last_checkpoint_loads(gone: Path, how: str) -> None:
    """On one process, too."""
    expected = torch.load(gone / f"{how}-weights")
    alone = faults.layer(6)
    before = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    weights = get_model_state_dict(alone)
    dcp.load(weights, checkpoint_id=gone / f"{how}-step-1", no_dist=True)
    set_model_state_dict(alone, weights)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, expected[name]) and not torch.equal(parameter, before[name])


def _process(rank: int, folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    store: Any = f"file://{folder}/{how}-store"
    dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT), world_size=3, rank=rank)
    faults.die(rank, str(folder), how)
