"""Rows: FSDP2 and DDP. In a test they run in one process; `test_processes.py` runs them in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.company.matrix import Case, Results, row, whole


@contextmanager
def process_group() -> Iterator[Any]:
    """A mesh over the processes there are; a group of this process alone if there is none."""
    from torch.distributed.device_mesh import init_device_mesh

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (dist.get_world_size(),))
    finally:
        if alone:
            dist.destroy_process_group()


def _layers(model: nn.Module) -> list[nn.Module]:
    names = ("DecoderLayer", "EncoderLayer", "TransformersBlock")
    return [module for module in model.modules() if type(module).__name__.endswith(names)]


def _leaves(model: nn.Module) -> list[nn.Module]:
    """Every module that owns parameters, but for the embeddings, which models tie."""
    return [m for m in model.modules() if list(m.parameters(recurse=False)) and not isinstance(m, nn.Embedding)]


_PIECES: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "model": lambda model: [],
    "layer": _layers,
    "module": lambda model: [m for m in _leaves(model) if m is not getattr(model, "lm_head", None)],
}


def _shard(model: nn.Module, pieces: Callable[[nn.Module], list[nn.Module]], mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in pieces(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _train(case: Case, model: nn.Module) -> Results:
    """Two steps of the experts alone, then a look at everything."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**case.column.inputs()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **{name: whole(p) for name, p in model.named_parameters()}}


for _name, _pieces in _PIECES.items():

    @row(f"FSDP2 per {_name}, after", processes=2)
    def _after(case: Case, pieces: Callable[[nn.Module], list[nn.Module]] = _pieces) -> Results:
        with process_group() as mesh:
            return _train(case, _shard(case.model(), pieces, mesh))

    @row(f"FSDP2 per {_name}, before")
    def _before(case: Case, pieces: Callable[[nn.Module], list[nn.Module]] = _pieces) -> Results:
        with process_group() as mesh:
            # A Linear that is wrapped by itself is for its module to compute.
            options = {"strict": False} if pieces is _PIECES["module"] else {}
            return _train(case, case.attach(_shard(case.make(), pieces, mesh), **options))


@row("DDP", processes=2)
def ddp(case: Case) -> Results:
    with process_group():  # no name keeps the wrapper, which may wait for ever for a group that is gone before it
        return _train(case, nn.parallel.DistributedDataParallel(case.model(), find_unused_parameters=True))
