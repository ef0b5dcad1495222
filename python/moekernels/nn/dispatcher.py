"""Bringing tokens to the experts they are routed to, and the results back.

A dispatcher is any object with the method of :class:`Dispatcher`. Expert parallelism is another one: it sends rows to
the processes that hold their experts, calls the experts there as if every row were a token with one choice, and sends
the results back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from moekernels import ops
from moekernels.nn._checks import check, check_counts
from moekernels.nn.router import RouterOutput

#: ``experts(hidden [T, H], routing_weights [T, K], plan) -> [T, H]``, as :class:`moekernels.nn.GroupedExperts`.
Experts = Callable[[Tensor, Tensor, ops.Plan], Tensor]


class Dispatcher(Protocol):
    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        """``hidden [T, H]`` -> the weighted sum of every token's experts ``[T, H]``. Calls `experts`."""
        ...


class LocalDispatcher:
    """All experts on this device.

    Args:
        num_experts: number of experts.
        capacity: rows an expert takes per group of `group_size` tokens; None takes them all.
        group_size: tokens that share a capacity; None means all of them.

    Raises:
        ValueError: a number is not positive, or there is a group size without a capacity.
    """

    def __init__(self, num_experts: int, *, capacity: int | None = None, group_size: int | None = None) -> None:
        check_counts(self, num_experts=num_experts)
        for name, value in (("capacity", capacity), ("group_size", group_size)):
            if value is not None:
                check_counts(self, **{name: value})
        check(self, "group_size", group_size, capacity is not None or group_size is None, "None without a capacity")
        self.num_experts = num_experts
        self.capacity = capacity
        self.group_size = group_size

    def plan(self, expert_ids: Tensor) -> ops.Plan:
        """Where each row goes."""
        return ops.plan(expert_ids, self.num_experts, capacity=self.capacity, group_size=self.group_size)

    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        """See :meth:`Dispatcher.run`."""
        return experts(hidden, routing.routing_weights, self.plan(routing.expert_ids))
