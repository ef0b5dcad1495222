"""Linear layers, fast where PyTorch's are not: on a CPU, with few rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from moekernels import ops
from moekernels._settings import autocast_dtype
from moekernels.ops.activation import ACTIVATION_FUNCTIONS
from moekernels.quantization import QuantizedWeight

# Private to torch: where it is missing, there may always be one.
_has_any_global_hook: Callable[[], bool] = getattr(torch_module, "_has_any_global_hook", lambda: True)


class Linear(nn.Linear):
    """`torch.nn.Linear`, with the same parameters and, up to rounding, the same result.

    In inference on a CPU, few rows are multiplied by :func:`moekernels.ops.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def project(layer: nn.Module, input: Tensor, activation: str = "none") -> Tensor:
    """``activation(layer(input))``, by :func:`moekernels.ops.linear` where that is all a call would do.

    The models hold `torch.nn.Linear` itself, so that whoever looks for it (quantisers, adapters) finds it. Whatever has
    taken its place, and whatever has been attached to it, is called as ever; within such a call, too, a product with a
    plain weight is one of :func:`moekernels.ops.linear`, so that the bits do not depend on who watches.

    Args:
        layer: a `torch.nn.Linear`, or what has taken its place.
        input: ``[..., in_features]``.
        activation: one of :data:`moekernels.ops.ACTIVATIONS`.
    """
    if not _is_plain(layer):
        # A traced graph holds what the modules do.
        with nullcontext() if torch.compiler.is_compiling() else _LinearByKernel():
            out = layer(input)
        return ACTIVATION_FUNCTIONS[activation](out)
    # Found at once where they are registered; as attributes, only after a search that costs as much as the checks.
    registered: dict[str, Any] = layer._parameters
    weight, bias = registered.get("weight"), registered.get("bias")
    if weight is None:  # FSDP1 has put tensors of its own in their place
        weight, bias = layer.weight, layer.bias
    if type(weight) is QuantizedWeight and weight.compute_dtype != input.dtype:
        return _in_compute_dtype(weight, bias, input, activation)
    if activation == "none":
        return ops.linear(input, weight, bias)
    if activation == "relu":
        # A rectifier gives the same bits before rounding as after it, and saves a pass over memory.
        return ops.linear(input, weight, bias, activation="relu")
    return ACTIVATION_FUNCTIONS[activation](ops.linear(input, weight, bias))


def _in_compute_dtype(weight: QuantizedWeight, bias: Tensor | None, input: Tensor, activation: str) -> Tensor:
    """With a quantised weight whose products are computed in another dtype than that of input and result."""
    if autocast_dtype(input.device) is not None:
        return ACTIVATION_FUNCTIONS[activation](ops.linear(input, weight, bias))
    dtype = weight.compute_dtype
    out = ops.linear(input.to(dtype), weight, None if bias is None else bias.to(dtype))
    return ACTIVATION_FUNCTIONS[activation](out).to(input.dtype)


class _LinearByKernel(TorchFunctionMode):
    """Makes :func:`torch.nn.functional.linear` ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (ops.linear if func is F.linear else func)(*args, **(kwargs or {}))


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` does nothing but what :class:`torch.nn.Linear` does: what torch asks itself at a call."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or _has_any_global_hook()
    )


def project_in(dtype: torch.dtype, layer: nn.Module, input: Tensor) -> Tensor:
    """``layer(input)`` computed in `dtype`, whatever that of its weights or of autocast.

    Where the weights have another dtype, a `torch.nn.Linear` is called with its weights cast. What has taken its place
    computes in the dtype it has, and the result is cast.
    """
    # The context costs as much as the product of one token.
    is_on = autocast_dtype(input.device) is not None
    with torch.autocast(input.device.type, enabled=False) if is_on else nullcontext():
        if type(layer) is nn.Linear and "forward" not in layer.__dict__:
            if layer.weight.dtype == dtype:
                return layer(input.to(dtype))
            cast = {name: parameter.to(dtype) for name, parameter in layer.named_parameters()}
            return functional_call(layer, cast, (input.to(dtype),))
        weight = next((parameter for parameter in layer.parameters() if parameter.is_floating_point()), None)
        return layer(input.to(dtype if weight is None else weight.dtype)).to(dtype)
