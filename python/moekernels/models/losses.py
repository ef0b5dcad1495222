"""Training losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        ValueError: logits and labels are of different length, or (checked on the CPU) a label is no token.
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
    check_classes(shift_labels, logits.shape[-1], ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    target = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, target, ignore_index=ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def seq2seq_lm_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy of labels that stand where their logits do, in float32 at least.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, `ignore_index` where nothing is to be learnt (padding is not left out by itself).

    Raises:
        ValueError: the shapes do not fit, or (checked on the CPU) a label is no token.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without the vocabulary, {list(logits.shape[:-1])}, "
            f"got {list(labels.shape)} (logits_to_keep cannot be combined with labels)"
        )
    check_classes(labels, logits.shape[-1], ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    return F.cross_entropy(logits, labels.reshape(-1).to(logits.device), ignore_index=ignore_index)


def classification_problem(num_labels: int, labels: Tensor) -> str:
    """What labels of that kind ask for, in the words of `config.problem_type`."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """The loss of ``logits [B, num_labels]``, in float32 at least.

    Args:
        labels: for "regression" numbers ``[B, num_labels]``; for "single_label_classification" classes ``[B]``; for
            "multi_label_classification" ``[B, num_labels]``, 1 at every class that holds. Dimensions of size 1 may be
            left out.
        problem_type: one of these three.

    Raises:
        ValueError: the shapes do not fit, the problem is unknown, or (checked on the CPU) a label is no class.
    """
    if problem_type not in ("regression", "single_label_classification", "multi_label_classification"):
        raise ValueError(
            "problem_type must be 'regression', 'single_label_classification' or 'multi_label_classification', "
            f"got {problem_type!r}"
        )
    batch_size, num_labels = logits.shape
    wanted = batch_size if problem_type == "single_label_classification" else batch_size * num_labels
    if labels.numel() != wanted:
        shape = [batch_size] if problem_type == "single_label_classification" else [batch_size, num_labels]
        raise ValueError(f"labels of {problem_type} must have shape {shape}, got {list(labels.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1).long()
        check_classes(labels, num_labels, ignore_index=-100)
        return F.cross_entropy(logits, labels)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def check_classes(labels: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """Raise ValueError for a label that is neither a class nor `ignore_index`, if the labels are on the CPU."""
    # On an accelerator a look at the labels would wait for it.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1}, or {ignore_index} where nothing is to be learnt, "
            f"got {wrong[0].item()}"
        )


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e * q_e`` over all layers together, with ``f_e`` the mean number of choices of a token that fall on
    expert e and ``q_e`` its mean probability (Switch Transformers, arXiv 2101.03961, eq. 4-6, for K choices).

    Perfect balance gives `top_k`. Only the probabilities carry a gradient.

    Args:
        router_logits: one ``[T, E]`` per layer.
        top_k: choices per token.
        attention_mask: ``[B, S]`` with ``B * S = T``; tokens with 0 do not count. Columns before the last S belong to
            tokens in a cache, and a mask of more dimensions does not say which tokens there are: neither counts.
    """
    first = router_logits[0]
    mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
        length = first.shape[0] // max(attention_mask.shape[0], 1)
        mask = attention_mask[:, attention_mask.shape[1] - length :].reshape(-1).to(first.device, torch.float32)
    stats = _summed_stats(router_logits, top_k, mask=mask)
    tokens = sum(logits.shape[0] for logits in router_logits) if mask is None else len(router_logits) * mask.sum()
    return first.shape[-1] * (stats.counts / tokens * (stats.prob_sums / tokens)).sum()


def load_balancing_loss_by_row(router_logits: Sequence[Tensor]) -> Tensor:
    """The mean over the rows of a batch of ``E * sum_e f_e * q_e``, with ``f_e`` the share of a row's tokens whose most
    probable expert is e, over all layers, and ``q_e`` its mean probability (Switch Transformers, arXiv 2101.03961,
    eq. 4-6).

    Perfect balance gives 1. Only the probabilities carry a gradient.

    Args:
        router_logits: one ``[B, S, E]`` per layer.
    """
    return switch_router_losses(router_logits)[1]


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """The mean over tokens and layers of ``logsumexp(logits)^2``, which keeps logits small (ST-MoE, arXiv 2202.08906,
    eq. 5).

    Args:
        router_logits: one ``[..., E]`` per layer.
    """
    stats = _summed_stats([logits.flatten(0, -2) for logits in router_logits], top_k=1)
    return stats.z_sums.sum() / _count_tokens(router_logits)


def switch_router_losses(router_logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`router_z_loss` and :func:`load_balancing_loss_by_row` from one pass over the logits.

    Args:
        router_logits: one ``[B, S, E]`` per layer.
    """
    batch_size, _, num_experts = router_logits[0].shape
    stats = _summed_stats([logits.flatten(0, 1) for logits in router_logits], top_k=1, num_groups=batch_size)
    num_tokens = _count_tokens(router_logits)
    row_length = num_tokens // batch_size
    balance = num_experts * (stats.counts / row_length * (stats.prob_sums / row_length)).sum(dim=-1).mean()
    return stats.z_sums.sum() / num_tokens, balance


def _summed_stats(router_logits: Sequence[Tensor], top_k: int, **options: Any) -> ops.RouterStats:
    """:func:`moekernels.ops.router_stats` of every layer, added up where the first layer's logits are."""
    device = router_logits[0].device
    layers = [ops.router_stats(logits.to(device), top_k, **options) for logits in router_logits]
    return ops.RouterStats(*(torch.stack(sums).sum(dim=0) for sums in zip(*layers, strict=True)))


def _count_tokens(router_logits: Sequence[Tensor]) -> int:
    return sum(logits.shape[:-1].numel() for logits in router_logits)
