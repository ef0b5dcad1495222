from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekernels._settings import allows_tf32, is_batch_invariant
from moekernels.ops._call import autocast, call, check_plain, wants_gradient
from moekernels.ops._expert_weights import ExpertTensors, tensor_list
from moekernels.ops._float64 import in_float64, is_float64
from moekernels.ops._quantized import (
    ExpertMatrices,
    bias_of_experts,
    compute_dtype,
    dequantized,
    expert_bounds,
    has_kernel,
    is_quantized,
    multiply,
    not_compiled,
)
from moekernels.ops.activation import Swiglu
from moekernels.ops.activation import activation as activate
from moekernels.ops.permute import permute


def grouped_gemm(
    rows: Tensor,
    weight: ExpertTensors,
    expert_offsets: Tensor,
    *,
    bias: ExpertTensors | None = None,
    activation: str | Swiglu = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    transposed: bool = False,
    zero_unvisited: bool = False,
) -> Tensor:
    """Multiply each expert's rows by that expert's weight.

    For row i of expert e: ``y = rows[i] @ weight[e].T + bias[e]``, then ``activation(y)``, or with ``gated`` and
    ``gate, value = y.chunk(2)``: ``activation(gate) * value`` (arXiv 2002.05202); then times ``row_scale[i]``.
    Sums run in float32 and are rounded once, at the end. Under autocast everything but `row_scale` is cast first.

    For a gradient the rows and the weight are kept, and before an activation or a gate also y; with a `row_scale` y is
    computed again instead.

    With ``transposed``: ``out[i] = row_scale[i] * (rows[i] @ weight[e] + bias[e])``, for weights that are stored so. It
    is also, without a bias, the gradient of the rows when ``rows`` is the gradient of the output.

    Args:
        rows: ``[N, in_features]``, float32, bfloat16 or float16, sorted by expert; or, with ``token_of_row``,
            ``[T, in_features]`` in token order.
        weight: ``[E, out_features, in_features]``, same dtype. Gated: the gate's rows first, then the value's.
            Transposed: ``[E, in_features, out_features]``. Or a sequence of ``E * P`` matrices, expert slowest, the
            rows of an expert's P parts following one another (gated and not transposed: P is 1 or even). They may lie
            anywhere with any strides, and nothing is copied but a matrix whose rows are not dense. A stack or the
            matrices may be quantised, whatever their dtype; then there is a gradient of all else.
        expert_offsets: ``[E + 1]`` int32: expert e owns the rows ``expert_offsets[e] .. expert_offsets[e + 1]``. Output
            rows past the last offset are zero.
        bias: ``[E, out_features]``, same dtype; or, unless transposed, as many vectors as there are matrices.
        activation: one of :data:`ACTIVATIONS`; ``"gelu"`` is the exact one, ``"gelu_tanh"`` the approximation. Or,
            gated, a :class:`Swiglu`.
        gated: see above; halves the output width.
        row_scale: ``[N]`` float32.
        token_of_row: ``[N]`` int32: row i is ``rows[token_of_row[i]]``, gathered by the kernel.
        transposed: see above; an activation or a gate then takes a pass of its own, as an interleaved one always does,
            and goes with no `row_scale`.
        zero_unvisited: whether the matrices and vectors of an expert without rows get a gradient of zeros. By default
            they get none on the CPU, as where a model leaves the expert out, and zeros where only the device knows the
            number of rows, in compiled code, and of a stack.

    Returns:
        ``[N, out_features]``, or ``[N, out_features / 2]`` when gated, in the dtype of ``rows``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, an unknown activation, or (on the CPU, where they can be read
            without waiting) offsets that fall or exceed the number of rows.
    """
    if is_quantized(weight):
        return _of_quantized(
            rows, weight, expert_offsets, bias, row_scale, token_of_row,
            activation=activation, gated=gated, transposed=transposed, zero_unvisited=zero_unvisited,
        )  # fmt: skip
    weights, biases = tensor_list(weight), tensor_list(bias)
    check_plain("grouped_gemm", weight=weights, bias=biases)
    rows, weights, biases = autocast(rows, weights, biases)
    if is_float64(rows):
        return in_float64(
            grouped_gemm, rows, weight, expert_offsets, bias=bias, activation=activation, gated=gated,
            row_scale=row_scale, token_of_row=token_of_row, transposed=transposed,
        )  # fmt: skip
    name = str(activation)
    switches = (allows_tf32(), is_batch_invariant(), transposed, zero_unvisited)
    op = torch.ops.moekernels.grouped_gemm.default
    if (name != "none" or gated) and row_scale is None and wants_gradient(rows, *weights, *biases):
        linear = call(op, rows, weights, expert_offsets, biases, "none", False, None, token_of_row, *switches)
        return activate(linear, activation, gated=gated)
    return call(op, rows, weights, expert_offsets, biases, name, gated, row_scale, token_of_row, *switches)


@not_compiled
def _of_quantized(
    rows: Tensor,
    weight: ExpertTensors,
    expert_offsets: Tensor,
    bias: ExpertTensors | None,
    row_scale: Tensor | None,
    token_of_row: Tensor | None,
    **options: Any,
) -> Tensor:
    """The same with a quantised weight: by a kernel that reads codes, or of experts that have rows, one after the
    other."""
    num_rows = (rows if token_of_row is None else token_of_row).shape[0]
    activation, gated, transposed = options["activation"], options["gated"], options["transposed"]
    is_linear = activation == "none" and not gated
    fits = isinstance(activation, str) and not (transposed and (bias is not None or not is_linear))
    operands = row_scale, *tensor_list(bias)
    if fits and has_kernel(weight, rows, *operands, num_rows=num_rows, transposed=transposed):
        stack = bias_of_experts(bias, expert_offsets.shape[0] - 1)
        if not is_linear and row_scale is None and wants_gradient(rows, *operands):
            linear = multiply(rows, weight, expert_offsets, stack, token_of_row=token_of_row)
            return activate(linear, activation, gated=gated)
        return multiply(rows, weight, expert_offsets, stack, activation, gated, row_scale, token_of_row, transposed)
    if token_of_row is not None:
        rows = permute(rows, token_of_row)
    num_experts = expert_offsets.shape[0] - 1
    matrices = ExpertMatrices("grouped_gemm", "weight", weight, num_experts)
    biases = bias_of_experts(bias, num_experts)
    pieces, end = [], 0
    for expert, (begin, end) in enumerate(expert_bounds("grouped_gemm", expert_offsets, rows.shape[0])):
        if begin == end:
            continue
        with dequantized(matrices[expert], compute_dtype(rows)) as plain:
            piece = grouped_gemm(
                rows[begin:end],
                plain.unsqueeze(0),
                expert_offsets.new_tensor([0, end - begin]),
                bias=None if biases is None else biases[expert : expert + 1],
                row_scale=None if row_scale is None else row_scale[begin:end],
                **options,
            )
        pieces.append(piece)
    height, width = (sum(matrix.shape[-2] for matrix in matrices[0]), matrices[0][0].shape[-1])
    out_features = width if transposed else height // 2 if gated else height
    return torch.cat([*pieces, rows.new_zeros(rows.shape[0] - end, out_features, dtype=compute_dtype(rows))])
