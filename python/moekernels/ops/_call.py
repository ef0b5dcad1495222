"""How the Python functions call the registered ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from moekernels._settings import autocast_dtype

KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

# Private to torch: where they are missing, no transform and no forward mode is seen.
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_forward_ad: Any = torch.autograd.forward_ad
# Private to torch: where it is missing, the wrapper finds out by itself that there is nothing to do.
_below_autograd: Callable[[], contextlib.AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)

# How an op is differentiated by a function transform (_transforms.py).
transformable: dict[Any, Callable[..., Any]] = {}


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Call a registered op; what its checks found wrong becomes a ValueError."""
    return run(transformed(op), *args)


def run(op: Callable[..., Any], *args: Any) -> Any:
    """The same where no transform is at work."""
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if message.startswith("moekernels::"):
            raise ValueError(message) from None
        raise


def call_for_gradient(op: Callable[..., Any], differentiated: Tensor, *args: Any) -> Any:
    """:func:`call` of an op that has a gradient with respect to its first argument alone.

    Where none is wanted it goes past the gradient's wrapper, which is Python and costs more than routing one token.
    """
    if torch.compiler.is_compiling() or is_transformed() or wants_gradient(differentiated):
        return call(op, differentiated, *args)
    with _below_autograd():
        return run(op, differentiated, *args)


def transformed(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or what stands for it where it may have to be transformed."""
    return transformable.get(op, op) if is_transformed() else op


class Operators:
    """``torch.ops.moekernels`` for gradients, which may have to be transformed too."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return transformed(getattr(torch.ops.moekernels, name).default)


def is_transformed() -> bool:
    """Whether a function transform (torch.func), or forward-mode differentiation, may be at work."""
    if torch.compiler.is_compiling():
        return False
    return _transforms_are_active() or getattr(_forward_ad, "_current_level", -1) >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def runs_on_cpu_kernels(first: Tensor, *others: Tensor) -> bool:
    """Whether ops that only a CPU has, and without gradients, take these tensors."""
    if not first.is_cpu or first.dtype not in KERNEL_DTYPES or torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    has_gradients = torch.is_grad_enabled()
    if has_gradients and first.requires_grad:
        return False
    dtype = first.dtype
    for tensor in others:
        if not tensor.is_cpu or tensor.dtype != dtype or (has_gradients and tensor.requires_grad):
            return False
        if type(tensor) not in _PLAIN and not is_plain(tensor):
            return False
    return True


def same_device(op: str, first: str, **tensors: Any) -> None:
    """What torch computes in our place is held to one device too: some of its functions are silent about meta."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"moekernels::{op}: {name} must be on {device} like {first}, got {tensor.device}")


def autocast(rows: Tensor, *weights: list[Tensor]) -> tuple[Any, ...]:
    """The tensors of a matrix product: in autocast's dtype where that is on, as they are where it is off."""
    dtype = autocast_dtype(rows.device)
    if dtype is None:
        return rows, *weights
    return rows.to(dtype), *([tensor.to(dtype) for tensor in tensors] for tensors in weights)


# Tensors whose memory holds their values; and those that stand for others while torch traces.
_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor}
_PLAIN_FUNCTIONS = (torch.nn.Parameter.__torch_function__, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]


def is_plain(tensor: Tensor) -> bool:
    """Whether kernels may read a tensor's memory: its class leaves to torch what functions and operators do."""
    kind = type(tensor)
    if kind in _PLAIN:
        return True
    functions = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return functions in _PLAIN_FUNCTIONS and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def check_plain(op: str, **weights: Iterable[Tensor]) -> None:
    """A quantised, sharded or otherwise wrapped weight is not its memory.

    Raises:
        ValueError: naming the argument and the class.
    """
    for name, tensors in weights.items():
        for tensor in tensors:
            if type(tensor) not in _PLAIN and not is_plain(tensor):
                raise ValueError(
                    f"moekernels::{op}: {name} must hold plain tensors, got a {type(tensor).__name__}, whose values "
                    "kernels cannot read; convert it, or call its module instead"
                )
