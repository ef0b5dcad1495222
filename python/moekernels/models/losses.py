"""Training losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: int | Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of the next token, in float32 at least.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]``, the tokens themselves; `ignore_index` where nothing is to be learnt.
        num_items_in_batch: divide the sum by this and not by the number of labels (gradient accumulation).
        shift_labels: ``[B, S]``, labels that are already one ahead, instead of `labels`.

    Raises:
        ValueError: logits and labels are of different length.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss: labels or shift_labels must be given")
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if logits.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without the vocabulary, {list(logits.shape[:-1])}, "
            f"got {list(shift_labels.shape)} (logits_to_keep cannot be combined with labels)"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    target = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, target, ignore_index=ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e * q_e`` over all layers together, with ``f_e`` the mean number of choices of a token that fall on
    expert e and ``q_e`` its mean probability (Switch Transformers, arXiv 2101.03961, eq. 4-6, for K choices).

    Perfect balance gives `top_k`. Only the probabilities carry a gradient.

    Args:
        router_logits: one ``[T, E]`` per layer.
        top_k: choices per token.
        attention_mask: ``[B, S]`` with ``B * S = T``; tokens with 0 do not count.
    """
    num_experts = router_logits[0].shape[-1]
    device = router_logits[0].device
    chosen = torch.zeros(num_experts, device=device)
    probability = torch.zeros(num_experts, device=device)
    weights = None if attention_mask is None else attention_mask.reshape(-1).to(device, torch.float32)
    for logits in router_logits:
        logits = logits.to(device)
        probs = torch.softmax(logits.float(), dim=-1)
        with torch.no_grad():
            expert_ids = ops.route(logits, top_k)[1]
            # Zeros and ones, summed by a matrix product: exact, and no atomics.
            choices = torch.zeros_like(probs).scatter_(-1, expert_ids.long(), 1.0)
        row_weights = weights if weights is not None else probs.new_ones(probs.shape[0])
        chosen = chosen + row_weights @ choices
        probability = probability + row_weights @ probs
    rows = sum(logits.shape[0] for logits in router_logits) if weights is None else len(router_logits) * weights.sum()
    return num_experts * (chosen / rows * (probability / rows)).sum()
