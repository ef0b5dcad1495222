"""Dividing the experts of a model among processes."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel.style import ParallelStyle

from moekernels.distributed.batch import SplitBatch
from moekernels.distributed.collectives import Ranks
from moekernels.distributed.dispatchers import ExchangingDispatcher, SummingDispatcher, Sums
from moekernels.distributed.experts import ShardedExperts, held_experts, shard_experts
from moekernels.nn import GroupedExperts, LocalDispatcher, SparseMLP
from moekernels.nn.batch import Batch

Dispatch = Literal["all_to_all", "all_reduce"]


def expert_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dispatch: Dispatch = "all_to_all",
    sums: Sums = "exact",
    rows_per_rank: int | None = None,
    layers: Collection[str] | None = None,
    are_local: bool = False,
) -> nn.Module:
    """Divide the experts of every sparse layer among the ranks of a mesh, in place.

    A rank keeps its share of the experts, as ``torch.chunk`` cuts them, and everything else whole. The stacks become
    DTensors (``Shard(0)``) on the mesh, under the names they had, so that FSDP2 over another dimension, optimizers and
    distributed checkpoints take them as they are. What rank 0 of the mesh has in memory is what all begin with.

    Args:
        model: a model of this package, or any module with :class:`moekernels.nn.SparseMLP` in it; or one such layer.
        mesh: of one dimension, such as ``init_device_mesh("cuda", (2, 4), mesh_dim_names=("fsdp", "ep"))["ep"]``.
        dispatch: "all_to_all": every rank has rows of its own, which visit the ranks that hold their experts;
            capacities that are counted over a batch, and auxiliary losses, are those of all ranks' rows together.
            "all_reduce": every rank is given the same rows and draws the same random numbers, runs its own experts on
            them, and the outputs are summed.
        sums: for "all_to_all": "exact" gives the bits of one process, "partial" sends less where K is large; see
            :class:`ExchangingDispatcher`.
        rows_per_rank: for "all_to_all": every rank sends every rank that many rows in every layer, so that no numbers
            are exchanged; choices beyond are dropped, see :class:`ExchangingDispatcher` and :func:`dropped_choices`.
        layers: names of the sparse layers to divide, with ``*`` and ``?``; None for all.
        are_local: every rank's stacks hold its own experts only, as `from_pretrained` reads them; nothing is sent.

    Returns:
        The model.

    Raises:
        ValueError: on every rank, before anything is changed: the mesh does not fit, the ranks have different models,
            there are more ranks than experts, a name matches no sparse layer, or a layer cannot be divided.
    """
    _check_mesh(mesh)
    ranks = Ranks(mesh)
    found, problem = _chosen(model, layers)
    problem = problem or _wrong_options(dispatch, sums, rows_per_rank) or _problem(model, found, mesh, are_local)
    options = [dispatch, sums, *(() if rows_per_rank is None else (f"rows_per_rank={rows_per_rank}",))]
    _agree(ranks, problem, _description(model, [*found], *options))
    if not are_local:
        _broadcast(model, ranks)
    for name, layer in found.items():
        _divide(layer, ranks, dispatch, {"sums": sums, "rows_per_rank": rows_per_rank}, name, are_local)
    if dispatch == "all_to_all":
        _count_together(model, SplitBatch(ranks))
    return model


class ExpertParallel(ParallelStyle):
    """:func:`expert_parallel` of one layer, for a plan of ``torch.distributed.tensor.parallel.parallelize_module``.

    Args:
        dispatch, sums, rows_per_rank: as there. With "all_to_all", auxiliary losses of a model count its ranks' rows
            together only if `expert_parallel` was called on the model; capacities in any case.
    """

    def __init__(
        self, *, dispatch: Dispatch = "all_to_all", sums: Sums = "exact", rows_per_rank: int | None = None
    ) -> None:
        self.dispatch: Dispatch = dispatch
        self.sums: Sums = sums
        self.rows_per_rank = rows_per_rank

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return expert_parallel(
            module, device_mesh, dispatch=self.dispatch, sums=self.sums, rows_per_rank=self.rows_per_rank
        )


def held_parameters(model: nn.Module, mesh: DeviceMesh) -> dict[str, range]:
    """The stacks of a model that :func:`expert_parallel` will divide, by name, and the experts of each that this rank
    is to hold."""
    _check_mesh(mesh)
    size, rank = mesh.size(), mesh.get_local_rank()
    found = {}
    for prefix, layer in _sparse_layers(model):
        experts: Any = layer.experts
        for name, _ in experts.named_parameters(recurse=False):
            full_name = f"{prefix}.experts.{name}" if prefix else f"experts.{name}"
            found[full_name] = held_experts(experts.num_experts, size, rank)
    return found


def _sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseMLP]]:
    for name, module in model.named_modules():
        if isinstance(module, SparseMLP):
            yield name, module


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"expert_parallel: mesh must be a DeviceMesh of one dimension, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f'expert_parallel: mesh must have one dimension, such as mesh["ep"], got {mesh.ndim}: '
            f"{mesh.mesh_dim_names or tuple(mesh.shape)}"
        )


def _chosen(model: nn.Module, layers: Collection[str] | None) -> tuple[dict[str, SparseMLP], str | None]:
    """The layers to divide, and what is wrong with the choice."""
    every = dict(_sparse_layers(model))
    if not every:
        return {}, f"{type(model).__name__} has no sparse layer, so there are no experts to divide"
    if layers is None:
        return every, None
    if isinstance(layers, str):
        return {}, f"layers must be a list of names, got {layers!r}"
    chosen: dict[str, SparseMLP] = {}
    for pattern in layers:
        matching = fnmatch.filter(every, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.0)
            return {}, f"layers: {pattern!r} is no sparse layer; near names: {', '.join(near)}"
        chosen.update((name, every[name]) for name in matching)
    return chosen, None


def _wrong_options(dispatch: Any, sums: Any, rows_per_rank: Any) -> str | None:
    if dispatch not in ("all_to_all", "all_reduce"):
        return f"dispatch must be 'all_to_all' or 'all_reduce', got {dispatch!r}"
    if sums not in ("exact", "partial"):
        return f"sums must be 'exact' or 'partial', got {sums!r}"
    if rows_per_rank is None:
        return None
    if dispatch == "all_reduce":
        return "rows_per_rank is for dispatch 'all_to_all': with 'all_reduce' no rows are sent"
    if not isinstance(rows_per_rank, int) or rows_per_rank < 1:
        return f"rows_per_rank must be a positive number or None, got {rows_per_rank!r}"
    return None


def _problem(model: nn.Module, layers: dict[str, SparseMLP], mesh: DeviceMesh, are_local: bool) -> str | None:
    """Why this rank cannot do it; None if it can."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            return f"{name} is a DTensor already; divide experts before fully_shard and other styles, and once"
        if parameter.device.type not in (mesh.device_type, "meta"):
            return f"{name} is on {parameter.device}, but the mesh is of {mesh.device_type} devices"
    for name, layer in layers.items():
        experts: Any = layer.experts
        if type(experts) is not GroupedExperts:
            return f"{name}.experts must be GroupedExperts, got {type(experts).__name__}"
        if type(layer.dispatcher) is not LocalDispatcher:
            return f"{name} has a dispatcher of its own ({type(layer.dispatcher).__name__})"
        if mesh.size() > experts.num_experts:
            return f"{name} has {experts.num_experts} experts, fewer than the {mesh.size()} ranks of the mesh"
        if not are_local and any(p.dim() == 0 or p.shape[0] != experts.num_experts for p in experts.parameters()):
            return f"{name}.experts does not hold all of its {experts.num_experts} experts"
    return None


def _description(model: nn.Module, names: list[str], *options: str) -> tuple[str, str]:
    """What must be the same on all ranks: in words, and as a digest of every parameter's name, shape and dtype."""
    experts = {id(p) for _, layer in _sparse_layers(model) for p in layer.experts.parameters()}
    lines = [
        f"{name} {list(p.shape[1:] if id(p) in experts else p.shape)} {p.dtype} {p.requires_grad}"
        for name, p in model.named_parameters()
    ]
    counts = [layer.experts.num_experts for _, layer in _sparse_layers(model)]
    digest = hashlib.sha256("\n".join([*lines, *map(str, counts), *names, *options]).encode()).hexdigest()
    return f"{type(model).__name__} of {len(lines)} parameters, {', '.join(options)}", digest


def _agree(ranks: Ranks, problem: str | None, description: tuple[str, str]) -> None:
    """Raise the same error on all ranks if one of them has a problem, or another model."""
    found = ranks.gather_objects((problem, *description), "expert_parallel")
    for rank, (theirs, _, _) in enumerate(found):
        if theirs is not None:
            where = "" if theirs == problem else f" (on rank {rank} of the mesh)"
            raise ValueError(f"expert_parallel: {theirs}{where}")
    for rank, (_, words, digest) in enumerate(found):
        if digest != found[0][2]:
            raise ValueError(
                f"expert_parallel: rank {rank} of the mesh has another model than rank 0: {words}; there "
                f"{found[0][1]}. "
                "Names, shapes, dtypes, requires_grad and options must be the same"
            )


def _broadcast(model: nn.Module, ranks: Ranks) -> None:
    """Everything that has memory, from rank 0 of the mesh."""
    source = dist.get_global_rank(ranks.group, 0)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.numel():
            data = tensor.detach()
            sent = data.contiguous()
            dist.broadcast(sent, source, group=ranks.group)
            if sent is not data:
                data.copy_(sent)


def _divide(
    layer: SparseMLP, ranks: Ranks, dispatch: Dispatch, exchange: dict[str, Any], name: str, are_local: bool
) -> None:
    local: Any = layer.dispatcher
    options: dict[str, Any] = {"capacity": local.capacity, "group_size": local.group_size, "name": name}
    if dispatch == "all_to_all":
        layer.dispatcher = ExchangingDispatcher(local.num_experts, ranks, **options, **exchange)
    else:
        layer.dispatcher = SummingDispatcher(local.num_experts, ranks, **options)
    experts: Any = layer.experts
    shard_experts(experts, ranks.mesh, are_local=are_local)


def _count_together(model: nn.Module, batch: Batch) -> None:
    """Routers and models that count over a batch count over all of it."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "batch", None), Batch):
            module.batch = batch


def is_expert_parallel(model: nn.Module) -> bool:
    """Whether experts of the model are divided among processes."""
    return any(isinstance(module, ShardedExperts) for module in model.modules())


def splits_batch(model: nn.Module) -> bool:
    """Whether every rank has rows of its own ("all_to_all")."""
    return any(dispatcher.splits_batch for dispatcher in _dispatchers(model))


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that hold the experts of a model; None if they are all here."""
    return next((dispatcher.ranks for dispatcher in _dispatchers(model)), None)


def dropped_choices(model: nn.Module) -> int:
    """How many choices of this rank's tokens found no row under `rows_per_rank`, in all layers since the last call.

    Waits for the device: ask now and then, not in every step.
    """
    found = [d for d in _dispatchers(model) if isinstance(d, ExchangingDispatcher) and d.dropped is not None]
    total = sum(int(d.dropped) for d in found if d.dropped is not None)
    for dispatcher in found:
        dispatcher.dropped = None
    return total


def _dispatchers(model: nn.Module) -> Iterator[ExchangingDispatcher | SummingDispatcher]:
    for _, layer in _sparse_layers(model):
        if isinstance(layer.dispatcher, (ExchangingDispatcher, SummingDispatcher)):
            yield layer.dispatcher
