from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops._call import KERNEL_DTYPES, is_transformed, run, wants_gradient
from moekernels.ops._types import Routing

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda x: F.softplus(x).sqrt(),
}
_LEAST_SUM = 1e-20  # that weights are divided by, as in the code of DeepSeek-V3


def route_by_score(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "sigmoid",
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Routing:
    """Choose each token's experts by a score of its own for every expert: DeepSeek-V3 (arXiv 2412.19437), GLM, MiniMax.

    With ``s = score(logits)`` in float32 and ``c = s + selection_bias``, the bias choosing but not weighting
    (arXiv 2408.15664): the experts fall into `num_groups` groups of neighbours, of which only the `top_groups` with the
    largest sums of their two largest c stay; of their experts the `top_k` of largest c are chosen. Weights are s of the
    chosen, divided by their sum if `renormalize`, times `scale`. On exact ties the lowest index comes first.

    On a CPU a kernel does; elsewhere and in float64 torch's functions do, which also compute the weights where they
    have a gradient.

    Args:
        logits: ``[T, E]``, float32, bfloat16, float16 or float64.
        top_k: choices per token.
        score: "softmax", "sigmoid", or "sqrt_softplus" (DeepSeek-V4).
        selection_bias: ``[E]``.
        num_groups: divides E.
        top_groups: between 1 and `num_groups`, with room for `top_k` experts; None: all.
        renormalize: divide the weights of a token by their sum.
        scale: what weights are multiplied with.
        mask: ``[T]`` bool; tokens with False are not routed: expert ids -1, weights 0.

    Returns:
        The :class:`Routing`: ``weights [T, K]`` float32 (of float64 logits float64) and ``expert_ids [T, K]`` int32, by
        falling c.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, an unknown score, sizes that do not go together.
    """
    if _in_kernel(logits, selection_bias, mask):
        bias = selection_bias
        if bias is not None and (bias.requires_grad or bias.dtype != torch.float32):
            bias = bias.detach().float()
        with_gradient = wants_gradient(logits)
        weights, expert_ids = run(
            torch.ops.moekernels.route_by_score.default, logits.detach() if with_gradient else logits, top_k, score,
            bias, num_groups, top_groups, renormalize, scale, mask,
        )  # fmt: skip
        if with_gradient:
            scores = SCORES[score](logits.float())
            weights = _weights(scores, expert_ids.long().clamp(min=0), renormalize, scale, mask)
        return Routing(weights, expert_ids)
    groups = _checked(logits, top_k, score, selection_bias, num_groups, top_groups, mask)
    scores = SCORES[score](logits if logits.dtype == torch.float64 else logits.float())
    bias = None if selection_bias is None else selection_bias.detach()
    choice = scores.detach() if bias is None else scores.detach() + bias
    if groups < num_groups:
        parts = choice.unflatten(-1, (num_groups, -1))
        best = parts.topk(min(2, parts.shape[-1]), dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _largest(best, groups), True)
        choice = parts.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    expert_ids = _largest(choice, top_k)
    weights = _weights(scores, expert_ids, renormalize, scale, mask)
    if mask is not None:
        expert_ids = expert_ids.masked_fill(~mask.unsqueeze(-1), -1)
    return Routing(weights, expert_ids.int())


def _in_kernel(logits: Tensor, selection_bias: Tensor | None, mask: Tensor | None) -> bool:
    if not logits.is_cpu or logits.dtype not in KERNEL_DTYPES or is_transformed():
        return False
    if selection_bias is not None and not (selection_bias.is_cpu and selection_bias.dtype in KERNEL_DTYPES):
        return False
    return mask is None or (mask.is_cpu and mask.dtype == torch.bool)


def _weights(scores: Tensor, expert_ids: Tensor, renormalize: bool, scale: float, mask: Tensor | None) -> Tensor:
    """Of the chosen experts ``[T, K]``."""
    weights = scores.gather(-1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _LEAST_SUM)
    if scale != 1.0:
        weights = weights * scale
    return weights if mask is None else weights.masked_fill(~mask.unsqueeze(-1), 0.0)


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, the lowest first on ties."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def _checked(
    logits: Tensor,
    top_k: int,
    score: str,
    selection_bias: Tensor | None,
    num_groups: int,
    top_groups: int | None,
    mask: Tensor | None,
) -> int:
    """The number of groups that stay."""

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"moekernels::route_by_score: {message}")

    check(logits.dim() == 2, f"logits must have 2 dimensions [num_tokens, num_experts], got {logits.dim()}")
    check(logits.is_floating_point(), f"logits must be of a floating-point dtype, got {logits.dtype}")
    num_tokens, num_experts = logits.shape
    check(score in SCORES, f"score must be one of {', '.join(SCORES)}; got {score!r}")
    check(1 <= top_k <= num_experts, f"top_k must be between 1 and num_experts, {num_experts}, got {top_k}")
    if selection_bias is not None:
        shape = list(selection_bias.shape)
        check(shape == [num_experts], f"selection_bias must have shape [num_experts] = [{num_experts}], got {shape}")
    if mask is not None:
        check(list(mask.shape) == [num_tokens], f"mask must have shape [{num_tokens}], got {list(mask.shape)}")
        check(mask.dtype == torch.bool, f"mask must be bool, got {mask.dtype}")
    for name, tensor in (("selection_bias", selection_bias), ("mask", mask)):
        where = None if tensor is None else tensor.device
        check(where in (None, logits.device), f"{name} must be on {logits.device} like logits, got {where}")
    check(
        num_groups >= 1 and num_experts % num_groups == 0,
        f"num_groups must divide num_experts, {num_experts}, got {num_groups}",
    )
    groups = num_groups if top_groups is None else top_groups
    check(1 <= groups <= num_groups, f"top_groups must be between 1 and num_groups, {num_groups}, got {groups}")
    room = groups * (num_experts // num_groups)
    check(top_k <= room, f"top_k must be at most the {room} experts of {groups} groups, got {top_k}")
    return groups
