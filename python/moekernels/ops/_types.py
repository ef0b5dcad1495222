"""What passes between ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight, in the order of choice.

    Attributes:
        weights: ``[T, K]`` float32.
        expert_ids: ``[T, K]`` int32, -1 where a token is not routed.
    """

    weights: Tensor
    expert_ids: Tensor


class Plan(NamedTuple):
    """Which row holds which token's copy, and where each expert's rows begin. All int32, on the device of the ids.

    Rows are sorted by expert, and by (token, slot) within an expert. Their number is at most ``T * K``, which sizes
    every buffer; how many are in use is ``expert_offsets[-1]``, and no host code needs to know it.

    Attributes:
        expert_offsets: ``[E + 1]``; expert ``e`` owns the rows ``expert_offsets[e] .. expert_offsets[e + 1]``.
        token_of_row: ``[T * K]``; the token each row copies, -1 past the last row in use.
        row_of_slot: ``[T, K]``; the row of each choice, -1 where it was dropped or not routed.
    """

    expert_offsets: Tensor
    token_of_row: Tensor
    row_of_slot: Tensor
