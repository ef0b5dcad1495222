"""How the Python functions call the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekernels._settings import autocast_dtype

_CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Call a registered op; what its checks found wrong becomes a ValueError."""
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if message.startswith("moekernels::"):
            raise ValueError(message) from None
        raise


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def runs_on_cpu_kernels(first: Tensor, *others: Tensor) -> bool:
    """Whether ops that only a CPU has, and without gradients, take these tensors."""
    if not first.is_cpu or first.dtype not in _CPU_DTYPES or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (first.requires_grad or any(tensor.requires_grad for tensor in others)):
        return False
    return all(tensor.is_cpu and tensor.dtype == first.dtype for tensor in others)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors of a matrix product: in autocast's dtype where that is on, as they are where it is off."""
    dtype = autocast_dtype(next(tensor for tensor in tensors if tensor is not None).device)
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
