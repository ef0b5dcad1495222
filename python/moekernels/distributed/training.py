"""What a training loop needs where parameters are on different meshes: gradients that are added up, and their norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekernels.distributed.collectives import Ranks, joined
from moekernels.distributed.experts import ShardedExperts
from moekernels.distributed.parallel import ranks_of, splits_batch


@torch.no_grad()
def reduce_gradients(model: nn.Module, *, average: bool = True) -> None:
    """Make gradients those of the whole batch, after a backward pass in which every rank had rows of its own.

    The gradients of experts are sums over the ranks by themselves, as tokens came from all of them; those of everything
    else are summed here over the expert-parallel mesh, but for parameters that FSDP2 has sharded over it too. Where
    ranks have the same rows ("all_reduce") there is nothing to do.

    Args:
        model: as :func:`expert_parallel` returned it, perhaps with FSDP2 on top.
        average: divide by the number of ranks, for losses that are means over a rank's own rows, as DDP and FSDP2 do;
            False for losses that add up (with `num_items_in_batch`).
    """
    ranks = ranks_of(model)
    if ranks is None or not splits_batch(model):
        return
    experts = {id(p) for m in model.modules() if isinstance(m, ShardedExperts) for p in m.parameters()}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in experts and not _spans(p, ranks)]
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in _with_gradient_anywhere(dense, ranks):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(local_part(parameter.grad))
    for grads in by_kind.values():
        _sum_in_place(grads, ranks)
    if average:
        for parameter in model.parameters():
            if parameter.grad is not None and (id(parameter) in experts or not _spans(parameter, ranks)):
                local_part(parameter.grad).div_(ranks.size)


_BUCKET = 32 * 2**20  # bytes that are summed together


def _sum_in_place(grads: list[Tensor], ranks: Ranks) -> None:
    buckets: list[list[Tensor]] = [[]]
    for grad in grads:
        if buckets[-1] and sum(other.nbytes for other in buckets[-1]) + grad.nbytes > _BUCKET:
            buckets.append([])
        buckets[-1].append(grad)
    for bucket in buckets:
        total = ranks.sum(joined(bucket), "summing gradients")
        for grad, part in zip(bucket, total.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view(grad.shape))


def _with_gradient_anywhere(parameters: list[nn.Parameter], ranks: Ranks) -> list[nn.Parameter]:
    """Those that have a gradient on some rank: a layer may be left out on one and not on another."""
    if not parameters:
        return []
    device = parameters[0].device
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32, device=device)
    total = ranks.sum(has, "gradients that there are").tolist()
    return [parameter for parameter, count in zip(parameters, total, strict=True) if count]


def _spans(parameter: Tensor, ranks: Ranks) -> bool:
    """Whether it is sharded over a mesh with further ranks of the expert-parallel one: then FSDP2 reduces over them."""
    if not isinstance(parameter, DTensor):
        return False
    others = set(dist.get_process_group_ranks(ranks.group)) - {dist.get_rank()}
    return bool(others & set(parameter.device_mesh.mesh.flatten().tolist()))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model as groups for an optimizer, by what holds them: here, or the ranks of a mesh.

    An optimizer that steps through many parameters at once (`foreach`, the default on a GPU, or `fused`) cannot mix
    them within a group.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(_holder(parameter), []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def _holder(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, foreach: bool | None = None
) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_` for parameters on several meshes, which it refuses: the norm of each
    mesh's gradients, joined to one.

    Args:
        parameters: all parameters of the model, on every rank.
        max_norm: the norm that gradients are scaled down to.
        norm_type: which norm; ``math.inf`` too.
        foreach: as there.

    Returns:
        The norm before, the same on all ranks.
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    by_mesh: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        grad = tensor.grad
        if grad is not None:
            by_mesh.setdefault(_holder(grad), []).append(grad)
    if not by_mesh:
        return torch.zeros(())
    norms = [torch.nn.utils.get_total_norm(grads, norm_type, foreach=foreach) for grads in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole), norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grads in by_mesh.values():
        torch._foreach_mul_([local_part(grad) for grad in grads], scale)
    return total
