from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekernels.quantization import Format, QuantizedWeight


def quantize(
    weight: Tensor, format: str | Format, *, dtype: torch.dtype | None = None, **options: Any
) -> QuantizedWeight:
    """Store a weight in few bits.

    Each matrix of a stack is quantised by itself. What cannot be represented stays visible: a group with a NaN reads
    back as NaN.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, float32, bfloat16 or float16.
        format: one of :data:`moekernels.quantization.FORMATS`, or a format with its options.
        dtype: what the result counts as, and is dequantised to by default; None: the dtype of `weight`.
        options: those of the format: `blocksize` and `double_quant` of ``"nf4"`` and ``"fp4"``, `group_size` of
            ``"int4"``.

    Returns:
        What :func:`linear`, :func:`grouped_gemm` and :func:`sparse_mlp` take for a weight.

    Raises:
        ValueError: unknown format or option, another dtype, an empty weight or one of other dimensions, or K not a
            multiple of the format's group.
    """
    return QuantizedWeight.quantize(weight, format, dtype=dtype, **options)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a quantised weight.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``.
        dtype: None: the one that `weight` counts as.

    Returns:
        A plain tensor: the float32 values of the format's definition, rounded to `dtype` once.

    Raises:
        ValueError: `weight` is not quantised.
    """
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"dequantize: weight must be a QuantizedWeight, got a {type(weight).__name__}")
    return weight.dequantize(dtype)
