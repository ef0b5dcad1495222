from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._call import call
from moekernels.ops._types import Plan


def plan(
    expert_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    group_size: int | None = None,
    priority: Tensor | None = None,
) -> Plan:
    """Sort every (token, choice) by expert, and drop what an expert has no place for.

    A stable counting sort: deterministic, and no shape depends on the ids. Within a group of ``group_size`` tokens an
    expert has ``capacity`` places; all first choices claim theirs before any second choice (GShard, arXiv 2006.16668),
    in token order or by falling ``priority``. Switch counts per batch row (``group_size`` = sequence length), NLLB-MoE
    over the whole batch.

    Args:
        expert_ids: ``[T, K]`` int32; an id outside ``[0, num_experts)`` is not routed.
        num_experts: E.
        capacity: places per expert and group, at least 1; None: no limit.
        group_size: tokens per capacity group; None: all tokens are one group. The last group may be short.
        priority: ``[T]``, any real dtype: tokens with higher values claim their places first, ties in token order.

    Returns:
        The :class:`Plan`.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, a capacity or group size below 1, or a group size without a
            capacity.
    """
    token_order = None if priority is None else torch.argsort(priority, descending=True, stable=True).int()
    return Plan(*call(torch.ops.moekernels.plan.default, expert_ids, num_experts, capacity, group_size, token_order))
