"""Bringing each token's copies to its experts and the results back.

A dispatcher is any object with the two methods of :class:`Dispatcher`; what lies between them sees only rows sorted by
expert. Expert parallelism is another dispatcher, whose two methods also exchange rows between processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moekernels import ops


class Dispatched(NamedTuple):
    """Rows on their way through the experts.

    Attributes:
        rows: ``[N, H]``, sorted by expert.
        expert_offsets: ``[E + 1]`` int32; expert ``e`` owns the rows ``expert_offsets[e] .. expert_offsets[e + 1]``.
        context: what ``combine`` of the same dispatcher needs to know.
    """

    rows: Tensor
    expert_offsets: Tensor
    context: Any


class Dispatcher(Protocol):
    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        """``hidden [T, H]``, ``expert_ids [T, K]``, ``expert_weights [T, K]`` -> rows sorted by expert."""
        ...

    def combine(self, rows: Tensor, context: Any) -> Tensor:
        """The experts' outputs ``[N, H]`` -> their weighted sum per token ``[T, H]``."""
        ...


class LocalDispatcher:
    """All experts on this device: plan and permute, un-permute.

    Args:
        num_experts: number of experts.
        capacity: rows an expert takes per group of `group_size` tokens; None takes them all.
        group_size: tokens that share a capacity; None means all of them.
    """

    def __init__(self, num_experts: int, *, capacity: int | None = None, group_size: int | None = None) -> None:
        self.num_experts = num_experts
        self.capacity = capacity
        self.group_size = group_size

    def plan(self, expert_ids: Tensor) -> ops.Plan:
        """Where each row goes; enough by itself for the fused op."""
        return ops.plan(expert_ids, self.num_experts, capacity=self.capacity, group_size=self.group_size)

    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        plan = self.plan(expert_ids)
        rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
        return Dispatched(rows, plan.expert_offsets, (plan.row_of_slot, expert_weights))

    def combine(self, rows: Tensor, context: Any) -> Tensor:
        row_of_slot, expert_weights = context
        return ops.unpermute(rows, row_of_slot, expert_weights)
