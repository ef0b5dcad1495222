"""One stack of weights for experts that have a Linear each.

The kernels want the experts' weights side by side, ``[E, out, in]``. Modules with a Linear per expert are packed once:
the stack is made, and every weight becomes a view of its part of it. Names, state dict and memory stay as they were, an
optimizer that updates a weight updates the stack, and gradients of the stack are handed out to the weights as views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekernels.integrations.transformers.experts import ExpertWeights


class _StackOf(torch.autograd.Function):
    """The stack as a function of its parts."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows = [part.shape[0] for part in parts]
        return stack.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grad.flatten(0, 1).split(ctx.rows))


class Stack:
    """The weights (or biases) of E experts with `len(linears[0])` Linears each, one below the other.

    Args:
        linears: per expert, the Linears whose rows follow one another.
        name: "weight" or "bias".
    """

    def __init__(self, linears: Sequence[Sequence[nn.Linear]], name: str) -> None:
        # The dictionaries that hold the parameters: looked up in every forward pass.
        self._owners = [linear._parameters for expert in linears for linear in expert]
        self._name = name
        self._num_experts = len(linears)
        self.tensor = self._pack()

    @property
    def parts(self) -> list[Tensor]:
        return [owner[self._name] for owner in self._owners]  # type: ignore[misc]

    @torch.no_grad()
    def _pack(self) -> Tensor:
        parts = self.parts
        rows = sum(part.shape[0] for part in parts)
        tensor = parts[0].new_empty(rows, *parts[0].shape[1:])
        begin = 0
        for part in parts:
            place = tensor[begin : begin + part.shape[0]]
            place.copy_(part)
            part.data = place
            begin += part.shape[0]
        self._pointers = [part.data_ptr() for part in parts]
        return tensor.view(self._num_experts, -1, *tensor.shape[1:])

    def get(self) -> Tensor:
        """``[E, rows, ...]``; part of the graph if one of the weights wants a gradient.

        Weights that were given new memory since (another device or dtype, assignment) are packed again.
        """
        parts = self.parts
        if not torch.compiler.is_compiling() and [part.data_ptr() for part in parts] != self._pointers:
            self.tensor = self._pack()
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return _StackOf.apply(self.tensor, *parts)
        return self.tensor

    @torch.no_grad()
    def scatter(self) -> None:
        """Give every weight memory of its own again."""
        for part in self.parts:
            part.data = part.data.clone()


class PackedExperts:
    """Stacks of everything that the experts of a layer have.

    Args:
        experts: one module per expert.
        up: the names of the Linears whose outputs, one after the other, are the up-projection: gate, then value.
        down: the name of the other one.
    """

    def __init__(self, experts: Sequence[nn.Module], up: Sequence[str], down: str) -> None:
        ups = [[getattr(expert, name) for name in up] for expert in experts]
        downs = [[getattr(expert, down)] for expert in experts]
        self.stacks = {"up": Stack(ups, "weight"), "down": Stack(downs, "weight")}
        if ups[0][0].bias is not None:
            self.stacks["up_bias"] = Stack(ups, "bias")
        if downs[0][0].bias is not None:
            self.stacks["down_bias"] = Stack(downs, "bias")

    def weights(self) -> ExpertWeights:
        return ExpertWeights(**{name: stack.get() for name, stack in self.stacks.items()})

    @property
    def num_bytes(self) -> int:
        return sum(stack.tensor.numel() * stack.tensor.element_size() for stack in self.stacks.values())

    def scatter(self) -> None:
        for stack in self.stacks.values():
            stack.scatter()


def why_not_packed(experts: Sequence[nn.Module], up: Sequence[str], down: str) -> str | None:
    """Why these experts cannot be packed; None if they can."""
    if not experts:
        return "it has no experts"
    for index, expert in enumerate(experts):
        for name in (*up, down):
            linear = getattr(expert, name, None)
            if type(linear) is not nn.Linear:
                return f"expert {index} has no plain torch.nn.Linear as {name}, but {type(linear).__name__}"
            if (reason := _why_not_plain(linear)) is not None:
                return f"{name} of expert {index} {reason}"
            first = getattr(experts[0], name)
            for what in ("weight", "bias"):
                mine, others = getattr(linear, what), getattr(first, what)
                if (mine is None) != (others is None) or (
                    mine is not None
                    and (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device)
                ):
                    return f"{name} of expert {index} differs from that of expert 0 in shape, dtype, device or bias"
    return None


def _kind(linear: nn.Linear) -> list[Any]:
    """What must be the same for all experts."""
    return [(name, p.shape, p.dtype, p.device) for name, p in linear.named_parameters()]


def _why_not_plain(linear: nn.Linear) -> str | None:
    """Why the weights of a Linear are not ordinary memory of ours."""
    for parameter in linear.parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"is sharded or quantised ({type(parameter.data).__name__})"
        if parameter.is_meta:
            return "has no data yet (meta device): it is offloaded, or not loaded"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has weights of {parameter.dtype}; the kernels take float32, bfloat16 and float16"
    return None
