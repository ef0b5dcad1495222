"""Weights and biases of experts: a stack, or a sequence of tensors that lie anywhere and are not copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from moekernels.ops._call import Operators

ExpertTensors: TypeAlias = Tensor | Sequence[Tensor]
"""One stack ``[E, rows, columns]`` (of biases ``[E, rows]``), or ``E * P`` matrices (vectors) of equal shape.

In the sequence expert is the slowest index, and the rows of an expert's P parts follow one another: a gated
up-projection is ``[gate of expert 0, value of expert 0, gate of expert 1, ...]``, or one matrix of both for each.
"""

WEIGHT, BIAS = 3, 2
"""The dimensions of a stack."""


def tensor_list(tensors: ExpertTensors | None) -> list[Tensor]:
    """As the registered ops take them: a stack is a list of one, no bias an empty list."""
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def is_stack(tensors: list[Tensor], kind: int) -> bool:
    return len(tensors) == 1 and tensors[0].dim() == kind


def matrix_shape(weight: list[Tensor], num_experts: int) -> tuple[int, int]:
    """Rows and columns of one expert's whole matrix."""
    rows, columns = weight[0].shape[-2:]
    return rows if is_stack(weight, WEIGHT) else rows * (len(weight) // num_experts), columns


def stacked(tensors: list[Tensor], kind: int, num_experts: int) -> Tensor:
    """As one stack, which is a copy unless it was one."""
    return tensors[0] if is_stack(tensors, kind) else torch.cat(tensors).unflatten(0, (num_experts, -1))


class ExpertGrads:
    """Who of a weight or a bias wants a gradient, and how a stack of gradients is handed out."""

    def __init__(self, tensors: list[Tensor], kind: int, needed: list[bool], num_experts: int) -> None:
        self.is_stack = is_stack(tensors, kind)
        self.needed = needed
        self.num_parts = 1 if self.is_stack else max(len(tensors) // num_experts, 1)

    def __bool__(self) -> bool:
        return any(self.needed)

    def is_needed_by(self, expert: int) -> bool:
        if self.is_stack:
            return self.needed[0]
        return any(self.needed[expert * self.num_parts : (expert + 1) * self.num_parts])

    def of(self, stack: Tensor | None, experts: list[int]) -> list[Tensor | None]:
        """From the gradients ``[len(experts), rows, ...]`` of some experts; None for all that have none."""
        grads: list[Tensor | None] = [None] * len(self.needed)
        if stack is None or not self:
            return grads
        if self.is_stack:
            return [stack]
        parts = iter(stack.flatten(0, 1).unflatten(0, (len(experts) * self.num_parts, -1)).unbind())
        for expert in experts:
            for i in range(expert * self.num_parts, (expert + 1) * self.num_parts):
                part = next(parts)
                grads[i] = part if self.needed[i] else None
        return grads


def _counts(expert_offsets: Tensor) -> list[int] | None:
    """The rows of each expert; None where reading them would wait for a device or end a trace."""
    wrapped = type(expert_offsets) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(expert_offsets)
    if wrapped or not expert_offsets.is_cpu or torch.compiler.is_compiling():
        return None
    return [end - begin for begin, end in pairwise(expert_offsets.tolist())]


def _indices(counts: list[int], experts: list[int]) -> Iterator[Tensor]:
    begin, wanted = 0, set(experts)
    for expert, count in enumerate(counts):
        if expert in wanted:
            yield torch.arange(begin, begin + count, dtype=torch.int32)
        begin += count


def expert_grads(
    grad_rows: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    weight: ExpertGrads,
    bias: ExpertGrads,
    *,
    grad_token_of_row: Tensor | None = None,
    token_of_row: Tensor | None = None,
    bias_scale: Tensor | None = None,
    allow_tf32: bool = False,
    zero_unvisited: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of weights and biases, by ``grouped_weight_grad``.

    One buffer holds those of all experts that get one. Of a sequence these are, where the counts can be read, experts
    with rows, or without them if `zero_unvisited`, of which anything wants a gradient; otherwise all.
    """
    num_experts = expert_offsets.shape[0] - 1
    experts = list(range(num_experts))
    if not weight and not bias:
        return weight.of(None, experts), bias.of(None, experts)
    counts = None if weight.is_stack or bias.is_stack else _counts(expert_offsets)
    if counts is not None:
        experts = [
            expert
            for expert in experts
            if (counts[expert] > 0 or zero_unvisited) and (weight.is_needed_by(expert) or bias.is_needed_by(expert))
        ]
        if not experts:
            return weight.of(None, experts), bias.of(None, experts)
        if len(experts) < num_experts:
            if sum(counts[expert] for expert in experts) < sum(counts):
                index = torch.cat(list(_indices(counts, experts)))
                grad_token_of_row = index if grad_token_of_row is None else grad_token_of_row[index]
                token_of_row = index if token_of_row is None else token_of_row[index]
                bias_scale = None if bias_scale is None else bias_scale[index]
            ends = torch.tensor([0, *[counts[expert] for expert in experts]]).cumsum(0)
            expert_offsets = ends.int()
    grad_weight, grad_bias = Operators().grouped_weight_grad(
        grad_rows, rows, expert_offsets, grad_token_of_row, token_of_row, bias_scale, bool(bias), allow_tf32
    )
    return weight.of(grad_weight, experts), bias.of(grad_bias, experts)
