"""The score of every generated token, out of the scores of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def transition_scores(
    sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None = None, normalize_logits: bool = False
) -> Tensor:
    """See :meth:`GenerationMixin.compute_transition_scores`."""
    num_steps = len(scores)
    rows = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, num_steps)
    ended = None
    if beam_indices is not None:
        num_steps = int((beam_indices >= 0).sum(dim=1).max())
        rows = beam_indices[:, :num_steps].long()
        ended = rows < 0
        rows = rows.clamp(min=0)
    steps = torch.arange(num_steps, device=sequences.device).expand_as(rows)
    table = torch.stack(list(scores[:num_steps]))  # [steps, rows, V]
    if normalize_logits:
        table = table.log_softmax(dim=-1)
    chosen = table[steps, rows, sequences[:, sequences.shape[1] - num_steps :]]
    return chosen if ended is None else chosen.masked_fill(ended, 0)
