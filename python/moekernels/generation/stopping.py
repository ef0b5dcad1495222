"""When a sequence is finished.

A criterion is a callable `(input_ids [B, length], scores) -> bool [B]`, or one bool for all; `scores` is the tuple of
the scores of all steps so far where the caller asked for them, and None otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.pipeline import merged
from moekernels.generation.processors import TokenIds, token_list

Criterion = Callable[..., "Tensor | bool"]


class StoppingCriteria:
    """Base class; a plain function of the same arguments serves as well."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor | bool:
        raise NotImplementedError(f"{type(self).__name__} does not say when to stop")


class MaxLengthCriteria(StoppingCriteria):
    """Stops at `max_length` tokens, prompt included."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= self.max_length


class MaxTimeCriteria(StoppingCriteria):
    """Stops after the step during which `max_time` seconds have passed since the start."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> bool:
        return time.time() - self.initial_timestamp > self.max_time


class EosTokenCriteria(StoppingCriteria):
    """Stops a sequence at any of the end tokens."""

    def __init__(self, eos_token_id: TokenIds) -> None:
        self.eos_token_id = torch.tensor(token_list("eos_token_id", eos_token_id), dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        if self.eos_token_id.device != input_ids.device:
            self.eos_token_id = self.eos_token_id.to(input_ids.device)
        last = input_ids[:, -1]
        if len(self.eos_token_id) == 1:
            return last == self.eos_token_id
        return torch.isin(last, self.eos_token_id)


class StopStringCriteria(StoppingCriteria):
    """Stops a sequence when its newest token completes one of the given strings.

    Args:
        tokenizer: has `decode(ids) -> str`.
        stop_strings: one or more strings, none empty.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not self.stop_strings or "" in self.stop_strings:
            raise ValueError(f"stop_strings must be non-empty strings, got {stop_strings!r}")
        # Every token has at least one byte, so a string cannot span more tokens than it has bytes.
        self._window = max(len(string.encode()) for string in self.stop_strings) + 1

    def _found(self, ids: list[int]) -> bool:
        text, before = self.tokenizer.decode(ids), self.tokenizer.decode(ids[:-1])
        # What is new ends after what both have in common; part of it may have been there before, as of "\n\n".
        common = len(before)
        if not text.startswith(before):
            common = next(
                (i for i, pair in enumerate(zip(text, before, strict=False)) if pair[0] != pair[1]), len(text)
            )
        return any(text.find(string, max(common - len(string) + 1, 0)) >= 0 for string in self.stop_strings)

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        tails = input_ids[:, -self._window :].tolist()
        return torch.tensor([self._found(ids) for ids in tails], device=input_ids.device)


class StoppingCriteriaList(list[Criterion]):
    """Criteria of which any one stops a sequence."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        done = input_ids.new_zeros(input_ids.shape[0], dtype=torch.bool)
        for criterion in self:
            done = done | criterion(input_ids, scores, **kwargs)
        return done

    @property
    def max_length(self) -> int | None:
        """The smallest length that a `MaxLengthCriteria` in the list sets."""
        limits = [criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)]
        return min(limits, default=None)


def build_stopping_criteria(
    config: GenerationConfig,
    *,
    custom: Iterable[Criterion] = (),
    tokenizer: Any = None,
    max_position_embeddings: int | None = None,
) -> StoppingCriteriaList:
    """The criteria `config` asks for, and the caller's; one of the caller's takes the place of one of the same class.

    Raises:
        ValueError: the config has stop strings, but there is no tokenizer to find them with.
    """
    criteria = StoppingCriteriaList([MaxLengthCriteria(config.max_length, max_position_embeddings)])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the model's tokenizer: pass tokenizer= to generate()")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    if config.eos_token_id is not None:
        criteria.append(EosTokenCriteria(config.eos_token_id))
    return StoppingCriteriaList(merged(criteria, custom))
