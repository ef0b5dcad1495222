from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.ops._call import call
from moekernels.ops._float64 import in_float64, is_float64


class RouterStats(NamedTuple):
    """Sums over the tokens of each group, all float32.

    Attributes:
        counts: ``[G, E]``, how many tokens have an expert among their `top_k` most probable; has no gradient.
        prob_sums: ``[G, E]``, the sum of the probabilities.
        z_sums: ``[G]``, the sum of ``logsumexp(logits)^2``.
    """

    counts: Tensor
    prob_sums: Tensor
    z_sums: Tensor


def router_stats(logits: Tensor, top_k: int, *, num_groups: int = 1, mask: Tensor | None = None) -> RouterStats:
    """What the auxiliary losses of a router are made of, in one pass over its logits.

    Args:
        logits: ``[T, E]``, float32, bfloat16 or float16.
        top_k: choices per token, between 1 and E; on exact ties the lowest expert index counts.
        num_groups: G, equal parts of the tokens with sums of their own.
        mask: ``[T]`` float32, how much each token counts; what the logits of a token with 0 hold has no influence.

    Returns:
        The :class:`RouterStats`. The order of the sums depends on the shape alone.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, ``top_k`` out of range, or groups that are not equal.
    """
    if is_float64(logits):
        return RouterStats(*in_float64(router_stats, logits, top_k, num_groups=num_groups, mask=mask))
    return RouterStats(*call(torch.ops.moekernels.router_stats.default, logits, num_groups, top_k, mask))
