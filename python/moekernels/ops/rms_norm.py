from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops._call import run, runs_on_cpu_kernels, same_device

_rms_norm = torch.ops.moekernels.rms_norm.default


def rms_norm(input: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Root-mean-square layer normalisation (arXiv 1910.07467): ``weight * input / sqrt(mean(input^2) + eps)``.

    In inference on a CPU a kernel, float32 inside and rounded once, in which a row's bits do not depend on the others.
    All else is left to :func:`torch.nn.functional.rms_norm`, with its dtypes, gradients and autocast.

    Args:
        input: ``[..., H]``.
        weight: ``[H]``, same dtype.
        eps: added to the mean square.

    Returns:
        ``[..., H]`` in the dtype of ``input``.

    Raises:
        ValueError: for wrong shapes, dtypes or devices (where torch computes, its own errors).
    """
    if runs_on_cpu_kernels(input, weight):
        return run(_rms_norm, input, weight, eps)
    same_device("rms_norm", "input", input=input, weight=weight)
    return F.rms_norm(input, weight.shape, weight, eps)
