"""The ops under torch.func: gradients, vector-Jacobian products and vmap.

What ``torch.library.register_autograd`` makes of an op cannot be transformed. So under a transform the Python functions
call a :class:`torch.autograd.Function` with the same gradient instead. A batch is a loop over its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moekernels.ops._call import transformable

NO_FORWARD_MODE = (
    "moekernels: {op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); use reverse mode (vjp, jacrev) "
    "or float64, in which ops are plain PyTorch"
)


def loop(op: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The op on each element of the batch, and the results stacked."""
    flat, spec = pytree.tree_flatten(args)
    dims = pytree.tree_leaves(in_dims, is_leaf=lambda x: x is None)

    def at(i: int) -> tuple[Any, ...]:
        return pytree.tree_unflatten(
            [x if dim is None else x.select(dim, i) for x, dim in zip(flat, dims, strict=True)], spec
        )

    results = [op(*at(i)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacks = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
    return stacks, (0,) * len(stacks)


def register(op: Any, setup_context: Any, backward: Any) -> None:
    """Give an op, which has this gradient, a function that can be transformed."""
    name = op._opname

    def unflatten(values: tuple[Any, ...]) -> list[Any]:
        spec, *flat = values
        return list(pytree.tree_unflatten(flat, spec))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*values: Any) -> Any:
            return op(*unflatten(values))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.spec = inputs[0]
            args = unflatten(inputs)
            ctx.num_args = len(args)
            setup_context(_OpContext(ctx), args, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result = backward(_OpContext(ctx), *grads)
            result = result if isinstance(result, tuple) else (result,)
            return None, *pytree.tree_leaves(result[: ctx.num_args], is_leaf=lambda x: x is None)

        @staticmethod
        def vmap(info: Any, in_dims: Any, spec: Any, *flat: Any) -> tuple[Any, Any]:
            dims = pytree.tree_unflatten(list(in_dims[1:]), spec)
            args = pytree.tree_unflatten(list(flat), spec)
            return loop(transformable[op], info, dims, *args)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(NO_FORWARD_MODE.format(op=name.removesuffix("_train")))

    def function(*args: Any) -> Any:
        defaults = [argument.default_value for argument in op._schema.arguments[len(args) :]]
        flat, spec = pytree.tree_flatten((*args, *defaults))
        return Function.apply(spec, *flat)

    transformable[op] = function


class _OpContext:
    """The context as the op's gradient knows it: with `needs_input_grad` in the structure of the op's arguments."""

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)

    @property
    def needs_input_grad(self) -> tuple[Any, ...]:
        return tuple(pytree.tree_unflatten(list(self._ctx.needs_input_grad[1:]), self._ctx.spec))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)
