"""What the processes of a group exchange. An error says which of them was in which operation.

All are functional collectives, which torch.compile sees, and wait for nothing but their own result.

Ranks meet in them in one order, in the backward pass too. There the graph alone decides what comes first: two nodes
that wait for the same gradients may run either way round, and not the same way on every rank. So what a layer brings
to the others at one point is one node, whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh


class CommunicationError(RuntimeError, ConnectionError):
    """The other processes could not be reached, or did not take part in time."""


class Ranks:
    """The processes along a mesh of one dimension, among which experts are divided.

    A copy is the same object, as a process group cannot be copied.

    Args:
        mesh: of one dimension.

    Attributes:
        size, rank: how many they are, and which of them this one is.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def exchange(
        self, tensors: tuple[Tensor, ...], sent: list[int] | None, received: list[int] | None, what: str
    ) -> tuple[Tensor, ...]:
        """All-to-all: the first ``sent[0]`` rows to rank 0, the next ``sent[1]`` to rank 1 and so on; as many as
        `received` says come back, in the order of their ranks. None divides the rows evenly. The gradient goes the
        other way. Tensors ``[N, ...]`` of as many rows travel together, row by row."""
        return _Exchange.apply(sent, received, self, what, *tensors)

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum of the tensors of all ranks; its gradient is the sum of their gradients."""
        return _Sum.apply(tensor, self, what)

    def enter(self, tensors: tuple[Tensor, ...], what: str) -> tuple[Tensor, ...]:
        """Tensors that are the same on all ranks, of which each then uses a part: the gradients are summed."""
        return _Enter.apply(self, what, *tensors)

    def leave(self, tensor: Tensor, what: str) -> Tensor:
        """The sum of the parts, which is the same on all ranks, and so is its gradient."""
        return _Leave.apply(tensor, self, what)

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """``[...]`` of the same shape on every rank -> ``[size, ...]``, without a gradient."""
        gathered = self._run(what, functional.all_gather_tensor, tensor.detach()[None].contiguous(), 0)
        return gathered

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """What every rank has, by rank."""
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            raise self._failed(what, error) from error
        return found

    def _all_to_all(
        self, tensors: Sequence[Tensor], sent: list[int] | None, received: list[int] | None, what: str
    ) -> tuple[Tensor, ...]:
        if len(tensors) == 1:
            return (self._run(what, functional.all_to_all_single, tensors[0].contiguous(), received, sent),)
        parts = [_as_bytes(tensor) for tensor in tensors]
        rows = self._run(what, functional.all_to_all_single, torch.cat(parts, dim=1), received, sent)
        arrived = rows.split([part.shape[1] for part in parts], dim=1)
        # A copy of its own begins where its dtype may.
        copies = [part.clone(memory_format=torch.contiguous_format) for part in arrived]
        pairs = zip(copies, tensors, strict=True)
        return tuple(copy.view(like.dtype).view(copy.shape[0], *like.shape[1:]) for copy, like in pairs)

    def _all_reduce(self, tensor: Tensor, what: str) -> Tensor:
        return self._run(what, functional.all_reduce, tensor, "sum")

    def _run(self, what: str, collective: Any, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return functional.wait_tensor(collective(*arguments, self.group))
        try:
            return functional.wait_tensor(collective(*arguments, self.group))
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: RuntimeError) -> CommunicationError:
        reason = str(error).partition("\n")[0]
        return CommunicationError(
            f"rank {self.rank} of {self.size} of the expert-parallel mesh, in {what}: another rank has ended, cannot "
            f"be reached, or did not come here in time: {reason}"
        )


def _as_bytes(tensor: Tensor) -> Tensor:
    """``[N, ...]`` -> ``[N, bytes]``."""
    rows = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    # Of a matrix with no or one row or column torch says that it is contiguous whatever its strides.
    if not rows.is_contiguous() or rows.stride(-1) != 1:
        rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows)
    return rows.view(torch.uint8)


def swapped(what: str) -> str:
    return f"the gradient of {what}"


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: list[int] | None, received: list[int] | None, ranks: Ranks, what: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.splits, ctx.ranks, ctx.what = (received, sent), ranks, what
        return ranks._all_to_all(tensors, sent, received, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *ctx.ranks._all_to_all(grads, *ctx.splits, swapped(ctx.what))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what = ranks, what
        return ranks._all_reduce(tensor, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks._all_reduce(grads[0], swapped(ctx.what)), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.what = ranks, what
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(ctx.ranks._all_reduce(grad, swapped(ctx.what)) for grad in grads)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
        return ranks._all_reduce(tensor, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all elements."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
