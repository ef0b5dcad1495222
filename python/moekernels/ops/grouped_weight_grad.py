from __future__ import annotations

import torch
from torch import Tensor

from moekernels._settings import allows_tf32
from moekernels.ops._call import call
from moekernels.ops._float64 import in_float64, is_float64


def grouped_weight_grad(
    grad_rows: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    *,
    grad_token_of_row: Tensor | None = None,
    token_of_row: Tensor | None = None,
    bias_scale: Tensor | None = None,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum the gradient of each expert's weight, and of its bias, over that expert's rows.

    ``grad_weight[e] = grad_rows[e's rows].T @ rows[e's rows]``, where :func:`grouped_gemm` multiplied ``rows`` by the
    weight and ``grad_rows`` is the gradient of the product. ``grad_bias[e]`` is the sum of ``bias_scale[i] *
    grad_rows[i]``: a scale that is already part of ``rows`` is still missing there. Sums run in float32 and are rounded
    once, at the end. Experts without rows get zeros.

    Args:
        grad_rows: ``[N, out_features]``, float32, bfloat16 or float16, sorted by expert; or, with
            ``grad_token_of_row``, ``[T, out_features]`` in token order.
        rows: ``[N, in_features]``, same dtype; or, with ``token_of_row``, ``[T, in_features]`` in token order.
        expert_offsets: ``[E + 1]`` int32: expert e owns the rows ``expert_offsets[e] .. expert_offsets[e + 1]``. Rows
            past the last offset have no influence, whatever they hold.
        grad_token_of_row: ``[N]`` int32: row i of the gradient is ``grad_rows[grad_token_of_row[i]]``, gathered by the
            kernel; zero if there is no such token.
        token_of_row: the same for ``rows``.
        bias_scale: ``[N]`` float32.
        need_bias: whether to compute the gradient of the bias.

    Returns:
        ``grad_weight`` ``[E, out_features, in_features]`` and ``grad_bias`` ``[E, out_features]``, or ``[0]`` if it is
        not needed, in the dtype of ``grad_rows``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, or (on the CPU, where they can be read without waiting) offsets
            that fall or exceed the number of rows.
    """
    if is_float64(grad_rows):
        return in_float64(
            grouped_weight_grad, grad_rows, rows, expert_offsets, grad_token_of_row=grad_token_of_row,
            token_of_row=token_of_row, bias_scale=bias_scale, need_bias=need_bias,
        )  # fmt: skip
    return call(
        torch.ops.moekernels.grouped_weight_grad.default,
        grad_rows,
        rows,
        expert_offsets,
        grad_token_of_row,
        token_of_row,
        bias_scale,
        need_bias,
        allows_tf32(),
    )
