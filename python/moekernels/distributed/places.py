"""Rows whose number is fixed beforehand: every group has the same number of places, filled or not."""

from __future__ import annotations

import torch

from moekernels import ops


def spread(plan: ops.Plan, places: int) -> ops.Plan:
    """The same plan with as many rows for every group.

    Args:
        plan: of G groups, none of which has more than `places` rows.
        places: P, at least 1.

    Returns:
        A plan in which group ``g`` owns the rows ``g * P .. (g + 1) * P``; those behind its last copy token -1.
    """
    offsets, device = plan.expert_offsets, plan.expert_offsets.device
    num_groups = offsets.shape[0] - 1
    number = torch.arange(num_groups * places, device=device)
    group = number // places
    row = offsets[group] + number % places
    tokens = torch.cat((plan.token_of_row, plan.token_of_row.new_full((1,), -1)))
    token_of_row = torch.where(row < offsets[group + 1], tokens[row.clamp(max=tokens.shape[0] - 1)], -1)

    slot = plan.row_of_slot
    owner = torch.searchsorted(offsets[1:], slot, right=True).clamp(max=num_groups - 1)
    row_of_slot = torch.where(slot < 0, -1, slot - offsets[owner] + owner * places)
    begins = torch.arange(num_groups + 1, device=device, dtype=offsets.dtype) * places
    return ops.Plan(begins, token_of_row.int(), row_of_slot.int())
