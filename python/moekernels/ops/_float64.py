"""float64: the definition of an op in plain PyTorch, slow, for whoever checks gradients by finite differences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# float32 beside any other dtype, so beside float64 too.
_FLOAT32 = ("routing_weights", "row_scale", "bias_scale", "noise", "mask", "priority")


def is_float64(tensor: Tensor) -> bool:
    """Whether an op is left to its definition. On the meta device there is nothing to compute."""
    return tensor.dtype == torch.float64 and not tensor.is_meta


def in_float64(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` of :mod:`moekernels.ops` is defined to compute, once a float32 copy has passed its checks.

    Raises:
        ValueError: as the function does; also where one of its tensors is not float64.
    """
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    first = next(iter(given))
    for name, value in given.items():
        for tensor in pytree.tree_leaves(value):
            is_other = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
            if is_other and name not in _FLOAT32:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"moekernels::{function.__name__}: {name} must be float64 like {first}, got {dtype}")
    from moekernels.ops import reference  # which imports from the ops

    function(**pytree.tree_map_only(Tensor, _narrowed, given))
    return getattr(reference, function.__name__)(*args, **kwargs)


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.dtype == torch.float64 else tensor.detach()
