"""A model's weights on one process, and steps that all processes end alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekernels.distributed.collectives import CommunicationError
from moekernels.distributed.experts import whole_tensor


def is_main_rank() -> bool:
    """Whether this is rank 0 of all processes, which writes and prints for them."""
    return dist.get_rank() == 0


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, gathered from all processes that hold them, on the CPU of rank 0; elsewhere empty.

    All processes must call it. One parameter at a time is gathered; rank 0 ends with the whole model in memory.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter)
        if is_main_rank():
            weights[name] = whole.detach().cpu() if isinstance(parameter, DTensor) else parameter
    return weights


@contextmanager
def together(what: str, group: Any = None) -> Iterator[None]:
    """All processes of a group end this block, or none does.

    Raises:
        CommunicationError: where the block was ended well, but not on another rank; the message says what happened
            there.
    """
    try:
        yield
    except Exception as error:
        _tell(f"{type(error).__name__}: {error}", group)
        raise
    failures = {rank: failure for rank, failure in enumerate(_tell(None, group)) if failure is not None}
    if failures:
        rank, failure = next(iter(failures.items()))
        raise CommunicationError(f"{what} failed on rank {rank}: {failure}")


def _tell(failure: str | None, group: Any) -> list[str | None]:
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, failure, group=group)
    return found
