from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops import reference
from moekernels.ops._call import run, runs_on_cpu_kernels, same_device


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attend to keys that several queries may share: ``softmax(scale * query @ key.T + bias) @ value``.

    Made for decoding, where a few queries read many keys: every key is read once for up to six queries, from where it
    lies in a cache, and neither keys nor scores are copied into float32. Nine bfloat16 queries of a row and more are
    multiplied by tile registers, on processors that have them (AMX). The batch and the heads of the keys may divide
    those of the queries: then as many consecutive rows of the batch (beams), and heads (arXiv 2305.13245), as it takes
    look at the same keys. In inference on a CPU this is a kernel, in which a query's bits do not depend on the others,
    but for whether they are nine; elsewhere, and for a gradient, it is plain PyTorch.

    Args:
        query: ``[B, H, Q, D]``, float32, bfloat16 or float16.
        key, value: ``[B', G, S, D]``, same dtype; B' divides B and G divides H.
        scale: factor of the scores.
        bias: added to the scores, ``[B, H, Q, S]``, same dtype; 1 in place of B, H or Q, or B' in place of B.

    Returns:
        ``[B, Q, H * D]`` in the dtype of ``query``. Scores, softmax and sums are float32. Without keys it is zero.

    Raises:
        ValueError: for wrong shapes, dtypes or devices.
    """
    others = (key, value) if bias is None else (key, value, bias)
    if runs_on_cpu_kernels(query, *others):
        return attention_by_kernel(query, key, value, scale, bias)
    same_device("attention", "query", query=query, key=key, value=value, bias=bias)
    return reference.attention(query, key, value, scale=scale, bias=bias)


def attention_by_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The same, once :func:`runs_on_cpu_kernels` has been asked."""
    return run(torch.ops.moekernels.attention.default, query, key, value, scale, bias)
