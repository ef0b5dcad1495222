"""A batch whose rows are split over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekernels.distributed.collectives import Ranks, joined
from moekernels.nn.batch import Batch


class SplitBatch(Batch):
    """Every rank has rows of its own; the whole batch is all of them, in the order of the ranks.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def gather(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """See :meth:`moekernels.nn.Batch.gather`. The numbers of rows may differ; what is sent is padded to the
        largest."""
        num_rows = tensors[0].shape[0]
        counts = self.ranks.gather(torch.tensor(num_rows, device=tensors[0].device), "gathering numbers of tokens")
        sizes = counts.tolist()
        gathered = []
        for tensor in tensors:
            padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
            padded[:num_rows] = tensor.detach()
            parts = self.ranks.gather(padded, "gathering expert ids of the whole batch")
            gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
        return tuple(gathered), sum(sizes[: self.ranks.rank])

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`moekernels.nn.Batch.sum`; one exchange for all of them."""
        total = self.ranks.sum(joined(tensors), "summing router statistics of the whole batch")
        parts = total.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
