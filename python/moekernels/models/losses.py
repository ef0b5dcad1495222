"""Training losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops
from moekernels.nn.batch import LOCAL, Batch


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
    return _token_loss(logits, shift_labels, num_items_in_batch, ignore_index)


def seq2seq_lm_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of labels that stand where their logits do, in float32 at least.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, `ignore_index` where nothing is to be learnt (padding is not left out by itself).
        num_items_in_batch: divide the sum by this and not by the number of labels (gradient accumulation).

    Raises:
        ValueError: the shapes do not fit, or (checked on the CPU) a label is no token.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without the vocabulary, {list(logits.shape[:-1])}, "
            f"got {list(labels.shape)} (logits_to_keep cannot be combined with labels)"
        )
    return _token_loss(logits, labels, num_items_in_batch, ignore_index)


def _token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None, ignore_index: int) -> Tensor:
    check_classes(labels, logits.shape[-1], ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    target = labels.reshape(-1).to(logits.device)
    return _reduced(F.cross_entropy, logits, target, num_items_in_batch, ignore_index=ignore_index)


def _reduced(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, num_items: int | Tensor | None, **options: Any
) -> Tensor:
    """The mean of a loss; or, if a number of items is given, its sum over that."""
    if num_items is None:
        return loss(logits, target, **options)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits.device)
    return loss(logits, target, reduction="sum", **options) / num_items


def share_of_batch(
    labels: Tensor | None, num_items_in_batch: int | Tensor | None, ignore_index: int = -100
) -> Tensor | float:
    """The share of an accumulated batch that these labels are: what the weight of a loss that is no sum over labels,
    such as a router's, is multiplied by, so that its parts add up to one mean. 1 without accumulation.

    Args:
        labels: of this part of the batch; `ignore_index` does not count.
        num_items_in_batch: labels in all parts.
    """
    if labels is None or num_items_in_batch is None:
        return 1.0
    count = (labels != ignore_index).sum()
    return count / (
        num_items_in_batch.to(count.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )


def total(losses: Sequence[Tensor]) -> Tensor | None:
    """The sum of losses, where the first one is; None if there are none."""
    return sum((loss.to(losses[0].device) for loss in losses[1:]), losses[0]) if losses else None


def classification_problem(num_labels: int, labels: Tensor) -> str:
    """What labels of that kind ask for, in the words of `config.problem_type`."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str, *, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """The loss of ``logits [B, num_labels]``, in float32 at least.

    Args:
        labels: for "regression" numbers ``[B, num_labels]``; for "single_label_classification" classes ``[B]``; for
            "multi_label_classification" ``[B, num_labels]``, 1 at every class that holds. Dimensions of size 1 may be
            left out.
        problem_type: one of these three.
        num_items_in_batch: divide the sum by this and not by the number of labels (gradient accumulation).

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
        return _reduced(F.cross_entropy, logits, labels, num_items_in_batch)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    function = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return _reduced(function, logits, labels, num_items_in_batch)


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


def load_balancing_loss(
    router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None, batch: Batch = LOCAL
) -> Tensor:
    """``E * sum_e f_e * q_e`` over all layers together, with ``f_e`` the mean number of choices of a token that fall on
    expert e and ``q_e`` its mean probability (Switch Transformers, arXiv 2101.03961, eq. 4-6, for K choices).

    Perfect balance gives `top_k`. Only the probabilities carry a gradient.

    Args:
        router_logits: one ``[T, E]`` per layer.
        top_k: choices per token.
        attention_mask: ``[B, S]`` with ``B * S = T``; tokens with 0 do not count. Columns before the last S belong to
            tokens in a cache, and a mask of more dimensions does not say which tokens there are: neither counts.
        batch: what the tokens are a part of.
    """
    first = router_logits[0]
    mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
        length = first.shape[0] // max(attention_mask.shape[0], 1)
        mask = attention_mask[:, attention_mask.shape[1] - length :].reshape(-1).to(first.device, torch.float32)
    stats = _summed_stats(router_logits, top_k, mask=mask)
    here = stats.prob_sums.new_full((), first.shape[0]) if mask is None else mask.sum()
    counts, prob_sums, tokens = batch.sum((stats.counts, stats.prob_sums, len(router_logits) * here))
    return first.shape[-1] * (counts / tokens * (prob_sums / tokens)).sum()


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


def switch_router_losses(router_logits: Sequence[Tensor], batch: Batch = LOCAL) -> tuple[Tensor, Tensor]:
    """:func:`router_z_loss` and :func:`load_balancing_loss_by_row` from one pass over the logits.

    Args:
        router_logits: one ``[B, S, E]`` per layer.
        batch: what the rows are a part of.
    """
    batch_size, length, num_experts = router_logits[0].shape
    num_groups = max(batch_size, 1)  # without rows, one that is empty
    stats = _summed_stats([logits.flatten(0, 1) for logits in router_logits], top_k=1, num_groups=num_groups)
    row_length = max(length * len(router_logits), 1)
    balance = (stats.counts / row_length * (stats.prob_sums / row_length)).sum()
    here = balance.new_full((), batch_size), balance.new_full((), batch_size * row_length)
    z_sum, balance, rows, tokens = batch.sum((stats.z_sums.sum(), balance, *here))
    return z_sum / tokens, num_experts * balance / rows


def _summed_stats(router_logits: Sequence[Tensor], top_k: int, **options: Any) -> ops.RouterStats:
    """:func:`moekernels.ops.router_stats` of every layer, added up where the first layer's logits are."""
    device = router_logits[0].device
    layers = [ops.router_stats(logits.to(device), top_k, **options) for logits in router_logits]
    return ops.RouterStats(*(torch.stack(sums).sum(dim=0) for sums in zip(*layers, strict=True)))


def _count_tokens(router_logits: Sequence[Tensor]) -> int:
    return sum(logits.shape[:-1].numel() for logits in router_logits)
