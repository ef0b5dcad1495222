from __future__ import annotations

import torch
from torch import Tensor

from moekernels._settings import is_batch_invariant
from moekernels.ops._call import autocast, call, wants_gradient
from moekernels.ops.activation import activation as activate


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Multiply each expert's rows by that expert's weight.

    For row i of expert e: ``y = rows[i] @ weight[e].T + bias[e]``, then ``activation(y)``, or with ``gated`` and
    ``gate, value = y.chunk(2)``: ``activation(gate) * value`` (arXiv 2002.05202); then times ``row_scale[i]``.
    Sums run in float32 and are rounded once, at the end. Under autocast everything but `row_scale` is cast first.

    For a gradient the rows and the weight are kept, and before an activation or a gate also y; with a `row_scale` y is
    computed again instead.

    With ``transposed``: ``out[i] = row_scale[i] * (rows[i] @ weight[e])``, which is the gradient of the rows when
    ``rows`` is the gradient of the output.

    Args:
        rows: ``[N, in_features]``, float32, bfloat16 or float16, sorted by expert; or, with ``token_of_row``,
            ``[T, in_features]`` in token order.
        weight: ``[E, out_features, in_features]``, same dtype. Gated: the gate's rows first, then the value's.
            Transposed: ``[E, in_features, out_features]``.
        expert_offsets: ``[E + 1]`` int32: expert e owns the rows ``expert_offsets[e] .. expert_offsets[e + 1]``. Output
            rows past the last offset are zero.
        bias: ``[E, out_features]``, same dtype.
        activation: one of :data:`ACTIVATIONS`; ``"gelu"`` is the exact one, ``"gelu_tanh"`` the approximation.
        gated: see above; halves the output width.
        row_scale: ``[N]`` float32.
        token_of_row: ``[N]`` int32: row i is ``rows[token_of_row[i]]``, gathered by the kernel.
        transposed: see above; goes with no bias, no activation and no gate.

    Returns:
        ``[N, out_features]``, or ``[N, out_features / 2]`` when gated, in the dtype of ``rows``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, an unknown activation, or (on the CPU, where they can be read
            without waiting) offsets that fall or exceed the number of rows.
    """
    rows, weight, bias = autocast(rows, weight, bias)
    switches = (torch.backends.cuda.matmul.allow_tf32, is_batch_invariant(), transposed)
    op = torch.ops.moekernels.grouped_gemm.default
    if (activation != "none" or gated) and row_scale is None and wants_gradient(rows, weight, bias):
        linear = call(op, rows, weight, expert_offsets, bias, "none", False, None, token_of_row, *switches)
        return activate(linear, activation, gated=gated)
    return call(op, rows, weight, expert_offsets, bias, activation, gated, row_scale, token_of_row, *switches)
