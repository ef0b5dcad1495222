"""Experts of which a process holds some: stacks as DTensors, cut along the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moekernels import ops
from moekernels.nn import GroupedExperts


def held_experts(num_experts: int, size: int, rank: int) -> range:
    """The experts of a rank, as torch.chunk and DTensor divide them: 5 on 2 are 3 and 2, 6 on 4 are 2, 2, 2 and 0."""
    share = -(-num_experts // size)
    return range(min(rank * share, num_experts), min((rank + 1) * share, num_experts))


class ShardedExperts(GroupedExperts):
    """What :func:`shard_experts` makes of :class:`moekernels.nn.GroupedExperts`. Plans count this rank's experts."""

    def _stacks(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        up, down, up_bias, down_bias = super()._stacks()
        return _local(up), _local(down), _of_bias(up_bias), _of_bias(down_bias)

    def forward(self, hidden: Tensor, routing_weights: Tensor, plan: ops.Plan, **dropouts: float) -> Tensor:
        """See :meth:`moekernels.nn.GroupedExperts.forward`; on a rank without experts there are no rows."""
        stacks = self._stacks()
        if stacks[0].shape[0]:
            return super().forward(hidden, routing_weights, plan, **dropouts)
        # Nothing, but with gradients: an optimizer or a norm that leaves a parameter out on one rank waits on others.
        # They are products, and so have memory of their own as other ranks' have: to keep one that is expanded, DTensor
        # of torch 2.11 would ask the others, which do not come.
        nothing = torch.stack([(stack * 0).sum() for stack in stacks if stack is not None]).sum()
        never = torch.zeros((), dtype=torch.bool, device=hidden.device)
        unused = torch.where(never, routing_weights, 0).sum().to(hidden.dtype)
        return torch.where(never, hidden, nothing.to(hidden.dtype) + unused)


def _of_bias(stack: Tensor | None) -> Tensor | None:
    return None if stack is None else _local(stack)


def _local(stack: Tensor) -> Tensor:
    return stack.to_local() if isinstance(stack, DTensor) else stack


def shard_experts(experts: GroupedExperts, mesh: DeviceMesh, *, are_local: bool = False) -> None:
    """Keep this rank's experts of a stack, in place.

    Args:
        experts: the whole stacks; become :class:`ShardedExperts`.
        mesh: of one dimension.
        are_local: the parameters hold no others any more.
    """
    held = held_experts(experts.num_experts, mesh.size(), mesh.get_local_rank())
    for name, parameter in experts.named_parameters(recurse=False):
        # A copy, so that the memory of the others is free.
        part = parameter.detach() if are_local else parameter.detach()[held.start : held.stop].clone()
        shape = torch.Size((experts.num_experts, *part.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=strides)
        experts.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    experts.__class__ = ShardedExperts


def whole_tensor(tensor: Any) -> Any:
    """A tensor that processes hold together, gathered; all of them must ask for it. Others are returned as they are."""
    whole: Any = tensor.detach() if isinstance(tensor, DTensor) else None
    return tensor if whole is None else whole.full_tensor()
