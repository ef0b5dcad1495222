"""What the processes of `test_faults.py` run: calls that cannot go well, and what each rank was told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import moekernels as mk
from moekernels.distributed import CommunicationError, expert_parallel, parameter_groups, whole_weights
from moekernels.nn import SparseMLP
from tests.company.own_models import make


def layer(num_experts: int = 4, hidden: int = 8) -> SparseMLP:
    torch.manual_seed(0)
    return SparseMLP(hidden, 6, num_experts, 2)


def told(call: Callable[[], Any]) -> str:
    """The error of a call, with its kind."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run(rank: int, folder: str) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    ep: Any = mesh["ep"]
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "ep"))
    dense = make("M2M100")
    named = nn.ModuleDict({"first": layer(), "second": layer()})
    found = {
        "dense": told(lambda: expert_parallel(dense, ep)),
        "no mesh": told(lambda: expert_parallel(layer(), dist.group.WORLD)),  # type: ignore[arg-type]
        "two dimensions": told(lambda: expert_parallel(layer(), square)),
        "another device": told(lambda: expert_parallel(layer().to("cpu"), _Pretending(ep))),
        "misspelt": told(lambda: expert_parallel(named, ep, layers=["frist"])),
        "misspelt on one": told(lambda: expert_parallel(named, ep, layers=["first" if rank else "secnod"])),
        "misspelt dispatch": told(lambda: expert_parallel(layer(), ep, dispatch="alltoall")),  # type: ignore[arg-type]
        "misspelt sums": told(lambda: expert_parallel(layer(), ep, sums="half")),  # type: ignore[arg-type]
        "no rows": told(lambda: expert_parallel(layer(), ep, rows_per_rank=0)),
        "rows for nothing": told(lambda: expert_parallel(layer(), ep, dispatch="all_reduce", rows_per_rank=8)),
        "other rows": told(lambda: expert_parallel(layer(), ep, rows_per_rank=8 + rank)),
        "few experts": told(lambda: expert_parallel(_one_expert(), ep)),
        "another model": told(lambda: expert_parallel(layer(4, 8 + 8 * rank), ep)),
        "other options": told(lambda: expert_parallel(layer(), ep, dispatch="all_reduce" if rank else "all_to_all")),
        "twice": told(lambda: expert_parallel(expert_parallel(layer(), ep), ep)),
    }
    assert type(named["first"].experts).__name__ == "GroupedExperts"  # as it was
    # Weights that only one rank can read.
    path = Path(folder, "model")
    if rank == 0:
        make("OLMoE").save_pretrained(path)  # type: ignore[operator]
    dist.barrier()
    where = path if rank == 0 else path.with_name("elsewhere")
    config = mk.OlmoeConfig.from_pretrained(path)
    found["unreadable"] = told(lambda: mk.OlmoeForCausalLM.from_pretrained(where, config=config, mesh=ep))
    found["dispatch without mesh"] = told(lambda: mk.OlmoeForCausalLM.from_pretrained(path, dispatch="all_reduce"))
    # Calls that differ.
    shared = expert_parallel(layer(), ep)
    hidden = torch.randn(3, 8)

    def without_gradients_on_one() -> None:
        with torch.set_grad_enabled(rank == 0):
            shared(hidden)

    found["another call"] = told(without_gradients_on_one)
    found["still well"] = told(lambda: shared(hidden))
    return found


def _one_expert() -> SparseMLP:
    return SparseMLP(8, 6, 1, 1)


class _Pretending:
    """A mesh of GPUs, as far as one can have it here."""

    def __new__(cls, mesh: Any) -> Any:
        import copy

        other = copy.copy(mesh)
        other._device_type = "cuda"
        return other


def die(rank: int, folder: str, how: str) -> None:
    """Rank 1 of 3 ends, or stops answering, in the middle of a step; the others say when and how they noticed.

    After every step before there is a checkpoint, and beside it the weights that it must hold.
    """
    ep: Any = init_device_mesh("cpu", (3,), mesh_dim_names=("ep",))["ep"]
    shared = expert_parallel(layer(6), ep)
    hidden = torch.randn(5, 8)
    optimizer = torch.optim.SGD(parameter_groups(shared), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        shared(hidden)[0].sum().backward()
        optimizer.step()
        dcp.save(get_model_state_dict(shared), checkpoint_id=Path(folder, f"{how}-step-{step}"))
        weights = whole_weights(shared)
        if rank == 0:
            torch.save(weights, Path(folder, f"{how}-weights"))
    dist.barrier()
    out = shared(hidden)[0].sum()
    start = time.monotonic()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    told = "went well"
    try:
        out.backward()
        shared(hidden)
    except CommunicationError as error:
        told = str(error)
    Path(folder, f"{how}-{rank}").write_text(f"{time.monotonic() - start:.1f} {told}")
    os._exit(0)
