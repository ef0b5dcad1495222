from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._call import call
from moekernels.ops._float64 import in_float64, is_float64


def permute(hidden: Tensor, token_of_row: Tensor, row_of_slot: Tensor | None = None) -> Tensor:
    """Copy tokens into expert order: ``rows[i] = hidden[token_of_row[i]]``.

    Args:
        hidden: ``[T, H]``, float32, bfloat16 or float16.
        token_of_row: ``[N]`` int32, as :func:`plan` returns it; a row whose token is outside ``[0, T)`` becomes zero.
        row_of_slot: ``[T, K]`` int32 of the same plan. The gradient finds each token's rows in it, and without it sorts
            them.

    Returns:
        ``[N, H]`` in the dtype of ``hidden``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices.
    """
    if is_float64(hidden):
        return in_float64(permute, hidden, token_of_row, row_of_slot)
    return call(torch.ops.moekernels.permute.default, hidden, token_of_row, row_of_slot)


def unpermute(rows: Tensor, row_of_slot: Tensor, routing_weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows: ``out[t] = sum_k routing_weights[t, k] * rows[row_of_slot[t, k]]``.

    The sum runs over the choices in order, in float32, and is rounded once.

    Args:
        rows: ``[N, H]``, float32, bfloat16 or float16.
        row_of_slot: ``[T, K]`` int32, as :func:`plan` returns it; a slot of -1 adds nothing. For the gradient no row
            may belong to two tokens.
        routing_weights: ``[T, K]`` float32; None: all ones.

    Returns:
        ``[T, H]`` in the dtype of ``rows``; zero for a token without rows.

    Raises:
        ValueError: for wrong shapes, dtypes or devices.
    """
    if is_float64(rows):
        return in_float64(unpermute, rows, row_of_slot, routing_weights)
    return call(torch.ops.moekernels.unpermute.default, rows, row_of_slot, routing_weights)
