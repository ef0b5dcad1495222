from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels._settings import current_cpu_isa, is_batch_invariant
from moekernels.ops._call import run, runs_on_cpu_kernels, same_device, wants_gradient
from moekernels.ops._quantized import (
    compute_dtype,
    dequantized,
    has_kernel,
    is_quantized_matrix,
    multiply,
    not_compiled,
    one_expert,
)
from moekernels.ops.activation import ACTIVATION_FUNCTIONS
from moekernels.quantization.weight import QuantizedWeight, functions

_linear = torch.ops.moekernels.linear.default

# Up to here the time goes into reading the weight, at which this package's kernels are better; measured with torch
# 2.13, 768 to 4096 wide: on Zen 4 1.1 to 2.9 times as fast.
_MOST_ROWS = 64
# By tile registers, on a Xeon with AMX: bfloat16 0.9 to 1.8 times as fast, 0.7 to 1.2 times at 512 rows; float32 1.3 to
# 2.6 times up to 64 rows, 1.05 to 1.8 times up to 1024.
_MOST_ROWS_BY_TILES = {torch.bfloat16: 256, torch.float32: 1024}


def _most_rows(dtype: torch.dtype) -> int:
    return _MOST_ROWS_BY_TILES.get(dtype, _MOST_ROWS) if current_cpu_isa() == "amx" else _MOST_ROWS


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Multiply every row by one weight: ``activation(input @ weight.T + bias)``.

    In inference on a CPU few rows are multiplied by the kernel of :func:`grouped_gemm`, as those of one expert: sums
    run in float32 and are rounded once, at the end. With :func:`moekernels.batch_invariant` so are many, and the bits
    of a row do not depend on the others. All else is left to :func:`torch.nn.functional.linear` and the
    activation of torch, with their dtypes, gradients and autocast.

    Args:
        input: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, same dtype; or quantised, then with a gradient of `input` alone.
        bias: ``[out_features]``, same dtype.
        activation: one of :data:`ACTIVATIONS`; ``"gelu"`` is the exact one, ``"gelu_tanh"`` the approximation.

    Returns:
        ``[..., out_features]`` in the dtype of ``input``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices (where torch multiplies, its own errors), or an unknown
            activation.
    """
    if runs_on_cpu_kernels(input, weight) and (bias is None or not wants_gradient(bias)) and input.dim() > 0:
        num_rows = input.numel() // max(input.shape[-1], 1)
        batch_invariant = is_batch_invariant()
        if 0 < num_rows <= _MOST_ROWS or batch_invariant or 0 < num_rows <= _most_rows(input.dtype):
            return run(_linear, input, weight, bias, activation, batch_invariant)
    if is_quantized_matrix(weight):
        return _of_quantized(input, weight, bias, activation)
    same_device("linear", "input", input=input, weight=weight, bias=bias)
    if activation not in ACTIVATION_FUNCTIONS:
        raise ValueError(
            f"moekernels::linear: activation must be one of {', '.join(ACTIVATION_FUNCTIONS)}; got '{activation}'"
        )
    return ACTIVATION_FUNCTIONS[activation](F.linear(input, weight, bias))


@not_compiled
def _of_quantized(input: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str) -> Tensor:
    num_rows = input.numel() // max(input.shape[-1], 1) if input.dim() > 0 else 0
    if input.dim() > 0 and has_kernel(weight, input, bias, num_rows=num_rows):
        if activation in ACTIVATION_FUNCTIONS and activation != "none" and wants_gradient(input, bias):
            return ACTIVATION_FUNCTIONS[activation](_of_quantized(input, weight, bias, "none"))
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        bias = None if bias is None else bias.unsqueeze(0)
        out = multiply(rows, weight, one_expert(rows.shape[0], rows.device), bias, activation)
        return out if input.dim() == 2 else out.view(*input.shape[:-1], out.shape[-1])
    with dequantized([weight], compute_dtype(input)) as plain:
        return linear(input, plain, bias, activation=activation)


functions[F.linear] = linear
