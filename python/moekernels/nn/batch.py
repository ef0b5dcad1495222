"""The tokens that capacities and auxiliary losses are counted over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Batch:
    """Those of this process.

    Where the rows of a batch are split over several processes, :class:`moekernels.distributed.SplitBatch` takes its
    place in routers and models, so that they count as one process with the whole batch does.
    """

    def gather(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """Of tensors ``[T, ...]``, without a gradient: those of the whole batch, and where this process's begin."""
        return tensors, 0

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the parts of the batch, with its gradient."""
        return list(tensors)


LOCAL = Batch()
