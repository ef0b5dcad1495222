from __future__ import annotations

import torch
from torch import Tensor

from moekernels.ops._call import call_for_gradient
from moekernels.ops._float64 import in_float64, is_float64
from moekernels.ops._types import Routing

SCORINGS = ("softmax", "top2_gate", "sparsemixer")


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    probs_dtype: torch.dtype | None = None,
    eps: float = 0.01,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """Choose each token's experts and their weights.

    Scoring rules, all in float32 unless said otherwise; on exact ties the lowest expert index comes first:

    - ``"softmax"``: softmax over all experts, then the ``top_k`` largest (OLMoE, arXiv 2409.02060; Switch Transformers,
      arXiv 2101.03961, with ``top_k=1``). Ordered by probability rounded to ``probs_dtype``; without one, by logit.
    - ``"top2_gate"``: NLLB-MoE (arXiv 2207.04672). The first expert by probability rounded to ``probs_dtype``, the
      second by logit plus ``noise`` among the others.
    - ``"sparsemixer"``: PhiMoE's rule (arXiv 2409.12136). Two argmaxes, each weighted by a softmax over the experts
      within ``2 * eps`` of it; arithmetic in the dtype of the logits. With ``noise``, as in training, each pass
      picks the largest sum of logit and noise among those experts; the weights know nothing of it.

    A row that holds NaN or +inf, or only -inf, gets NaN weights and valid expert ids (NaN counts as the largest logit).

    Args:
        logits: ``[T, E]``, float32, bfloat16 or float16.
        top_k: choices per token, between 1 and E; 2 for ``"top2_gate"`` and ``"sparsemixer"``.
        scoring: the rule.
        renormalize: divide the weights of a token by their sum (for ``"top2_gate"`` by no less than the machine epsilon
            of ``probs_dtype``).
        probs_dtype: round probabilities to this dtype before choosing; float32 if None. float64 is float32 unless the
            logits are float64.
        eps: half the relative width of a near-tie in ``"sparsemixer"``.
        noise: float32, added where an expert is picked and not to its weight: ``[T, E]`` for the second expert of
            ``"top2_gate"``, ``[2, T, E]`` for the first and the second of ``"sparsemixer"``.
        mask: ``[T]`` bool; tokens with False are not routed: expert ids -1, weights 0.

    Returns:
        The :class:`Routing`: ``weights [T, K]`` float32 and ``expert_ids [T, K]`` int32, in the order of choice.

    Raises:
        ValueError: for wrong shapes, dtypes or devices, an unknown rule, ``top_k`` out of range.
    """
    if is_float64(logits):
        return in_float64(
            route, logits, top_k, scoring=scoring, renormalize=renormalize, probs_dtype=probs_dtype, eps=eps,
            noise=noise, mask=mask,
        )  # fmt: skip
    if probs_dtype == torch.float64:  # of tokens whose router computes in float32: nothing finer is there to round
        probs_dtype = torch.float32
    op = torch.ops.moekernels.route.default
    return Routing(*call_for_gradient(op, logits, top_k, scoring, renormalize, probs_dtype, eps, noise, mask))
