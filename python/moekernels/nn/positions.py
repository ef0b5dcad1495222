"""Where a token stands: sinusoidal positions, and buckets of distances for a learnt position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """A table of fixed position vectors that grows when a sequence is longer than it.

    They are those of arXiv 1706.03762, section 3.5, in the layout of fairseq: row p is
    ``[sin(p f_0), sin(p f_1), ..., cos(p f_0), ...]`` with ``f_j = 10000^(-j / (half - 1))``, and a zero at the end if
    the width is odd; the row of padding is zero. The rows are made in float32 and rounded to the dtype asked for.
    Nothing of it is in a checkpoint. A graph that is traced computes the rows it needs.

    Args:
        num_positions: rows to start with; no more than 8192 are made before a sequence needs them.
        hidden_size: width.
        padding_idx: the position of padding.
    """

    def __init__(self, num_positions: int, hidden_size: int, padding_idx: int) -> None:
        super().__init__()
        self.num_positions = min(num_positions, 8192)
        self.hidden_size = hidden_size
        self.padding_idx = padding_idx
        # Made when it is first asked for: a model may be built without memory.
        self._table: Tensor | None = None

    def forward(self, positions: Tensor, num_positions: int, dtype: torch.dtype) -> Tensor:
        """The vectors ``[..., hidden_size]`` of `positions` (int64), all of them below `num_positions`."""
        if torch.compiler.is_compiling():
            # A table that grows would be a graph of its own at every size.
            return self._vectors(positions).to(dtype)
        table = self._table
        fits = table is not None and table.shape[0] >= num_positions and table.dtype == dtype
        if table is None or not fits or table.device != positions.device:
            # Read once: another thread may be about to need fewer.
            size = self.num_positions = max(self.num_positions, num_positions)
            rows = self._vectors(torch.arange(size, dtype=torch.int64, device="cpu"))
            table = self._table = rows.to(positions.device, dtype)
        return table[positions]

    def _vectors(self, positions: Tensor) -> Tensor:
        """``[...]`` -> float32 ``[..., hidden_size]``."""
        half = self.hidden_size // 2
        exponents = torch.arange(half, dtype=torch.int64, device=positions.device).float()
        exponents = exponents * -(math.log(10000) / (half - 1))
        angles = positions[..., None].float() * exponents.exp()
        odd = angles.new_zeros(*positions.shape, self.hidden_size % 2)
        vectors = torch.cat((angles.sin(), angles.cos(), odd), dim=-1)
        return vectors.masked_fill((positions == self.padding_idx)[..., None], 0)

    def extra_repr(self) -> str:
        return f"{self.num_positions}, {self.hidden_size}, padding_idx={self.padding_idx}"


def positions_of_tokens(input_ids: Tensor, padding_idx: int, past: Tensor | int = 0) -> Tensor:
    """Positions int64 ``[B, S]`` that count tokens from ``padding_idx + 1`` on; padding itself has `padding_idx`.

    Args:
        input_ids: ``[B, S]``.
        padding_idx: the id of padding.
        past: tokens before these; a number, or broadcastable to ``[B, 1]``.
    """
    is_token = input_ids != padding_idx
    return (is_token.cumsum(dim=1) + past) * is_token + padding_idx


def relative_position_buckets(distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Buckets int64 of distances from query to key (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are one distance each, the others grow geometrically up to `max_distance`; what lies beyond it
    shares the last one.

    Args:
        distance: int64, key position minus query position, of any shape.
        bidirectional: give keys after the query the second half of all buckets; else they count as distance 0.
        num_buckets: of both directions together, at least 4.
        max_distance: more than half of `num_buckets`.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    growth = (steps.clamp(min=1).float() / num_exact).log() / math.log(max_distance / num_exact)
    beyond = num_exact + (growth * (num_buckets - num_exact)).long()
    return first + torch.where(steps < num_exact, steps, beyond.clamp(max=num_buckets - 1))
