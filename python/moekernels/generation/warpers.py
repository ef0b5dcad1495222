"""Logits processors that shape the distribution to sample from. Names and results as in transformers 4.56.2.

Each filter sets the scores of the tokens it removes to minus infinity, and keeps at least `min_tokens_to_keep` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekernels.generation.processors import NEGATIVE_INFINITY, LogitsProcessor


class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the scores by `temperature`: below 1 the likely tokens gain, above 1 they lose."""

    def __init__(self, temperature: float) -> None:
        if not isinstance(temperature, (int, float)) or temperature <= 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature!r} (greedy is do_sample=False)")
        self.temperature = float(temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


class _Filter(LogitsProcessor):
    def __init__(self, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        if not isinstance(min_tokens_to_keep, int) or min_tokens_to_keep < 1:
            raise ValueError(f"min_tokens_to_keep must be a positive integer, got {min_tokens_to_keep!r}")
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def _below_kept(self, scores: Tensor) -> Tensor:
        """Where a score is smaller than the `min_tokens_to_keep` largest."""
        kept = min(self.min_tokens_to_keep, scores.shape[-1])
        return scores < torch.topk(scores, kept).values[..., -1:]


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def _open_share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return float(value)


class TopKLogitsWarper(_Filter):
    """Keeps the `top_k` highest scores, and all that tie with the last of them."""

    def __init__(self, top_k: int, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
        self.top_k = max(top_k, min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        smallest_kept = torch.topk(scores, min(self.top_k, scores.shape[-1])).values[..., -1:]
        return scores.masked_fill(scores < smallest_kept, self.filter_value)


class TopPLogitsWarper(_Filter):
    """Keeps the fewest tokens whose probabilities sum to `top_p` or more (nucleus sampling, arXiv 1904.09751)."""

    _AT_FIRST = 1024  # tokens to look at before all of a long vocabulary are sorted

    def __init__(self, top_p: float, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = _share("top_p", top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A GPU sorts in no time, and should not be waited for. Close to 1 the order of the sum decides.
        if scores.device.type == "cpu" and scores.shape[-1] > 4 * self._AT_FIRST and self.top_p <= 0.99:
            few = self._among_the_best(scores)
            if few is not None:
                return few
        ascending, order = torch.sort(scores)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
        removed[..., -self.min_tokens_to_keep :] = False
        return scores.masked_fill(removed.scatter(1, order, removed), self.filter_value)

    def _among_the_best(self, scores: Tensor) -> Tensor | None:
        """The result, if the best tokens alone have that probability in every row: then the others need no sorting."""
        best, order = scores.topk(max(self._AT_FIRST, self.min_tokens_to_keep))
        probs = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
        total = probs.cumsum(dim=-1)
        if not bool((total[..., -1] >= self.top_p).all()):
            return None
        removed = total - probs >= self.top_p
        removed[..., : self.min_tokens_to_keep] = False
        mask = torch.ones_like(scores, dtype=torch.bool).scatter(1, order, removed)
        return scores.masked_fill(mask, self.filter_value)


class MinPLogitsWarper(_Filter):
    """Removes tokens less likely than `min_p` times the likeliest one (arXiv 2407.01082)."""

    def __init__(self, min_p: float, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = _share("min_p", min_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = scores.softmax(dim=-1)
        removed = probs < self.min_p * probs.amax(dim=-1, keepdim=True)
        kept = torch.topk(scores, min(self.min_tokens_to_keep, scores.shape[-1])).indices
        return scores.masked_fill(removed.scatter(1, kept, False), self.filter_value)


class TypicalLogitsWarper(_Filter):
    """Keeps the tokens whose surprise is closest to the entropy, up to a mass of `mass` (arXiv 2202.00666)."""

    def __init__(self, mass: float = 0.9, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = _open_share("typical_p", mass)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores.log_softmax(dim=-1)
        entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
        distance, order = torch.sort((-log_probs - entropy).abs())
        mass = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < self.mass).sum(dim=1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(1, last)
        removed[..., : self.min_tokens_to_keep] = False
        return scores.masked_fill(removed.scatter(1, order, removed), self.filter_value)


class EpsilonLogitsWarper(_Filter):
    """Removes tokens less likely than `epsilon` (arXiv 2210.15191)."""

    def __init__(self, epsilon: float, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _open_share("epsilon_cutoff", epsilon)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        removed = scores.softmax(dim=-1) < self.epsilon
        return scores.masked_fill(removed & self._below_kept(scores), self.filter_value)


class EtaLogitsWarper(_Filter):
    """Removes tokens less likely than `min(epsilon, sqrt(epsilon) exp(-entropy))` (arXiv 2210.15191)."""

    def __init__(self, epsilon: float, filter_value: float = NEGATIVE_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _open_share("eta_cutoff", epsilon)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores.log_softmax(dim=-1)
        probs = log_probs.exp()
        # A finite stand-in for log(0), so that impossible tokens add 0 to the entropy and not NaN.
        entropy = -(log_probs.clamp(min=torch.finfo(scores.dtype).min) * probs).sum(-1, keepdim=True)
        eta = (self.epsilon**0.5 * torch.exp(-entropy)).clamp(max=self.epsilon)
        removed = scores.softmax(dim=-1) < eta
        return scores.masked_fill(removed & self._below_kept(scores), self.filter_value)


class LogitNormalization(LogitsProcessor):
    """Turns the scores into log-probabilities."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=-1)
