"""Logits processors that enforce rules: penalties, bans and forced tokens.

A processor is a callable `(input_ids [B, length], scores float32 [B, V]) -> scores [B, V]` that leaves its arguments as
they are. Names and results are those of transformers 4.56.2, so its processors and these can be mixed in one list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

# One token id, or several.
TokenIds: TypeAlias = "int | Sequence[int] | Tensor"

NEGATIVE_INFINITY = float("-inf")


class LogitsProcessor:
    """Base class; a plain function of the same two arguments serves as well."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how it changes scores")


class LogitsProcessorList(list[Callable[[Tensor, Tensor], Tensor]]):
    """Processors applied one after another."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores

    @property
    def are_own(self) -> bool:
        """Whether all are of this package, whose processors keep no scores; a class derived from one of them is not."""
        return all(type(processor).__module__.startswith("moekernels.generation.") for processor in self)

    def overwrite(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same where `scores` are not needed any more, and all are of this package: bans are written into them."""
        for processor in self:
            if isinstance(processor, _Ban):
                processor.ban_(input_ids.shape[1], scores)
            else:
                scores = processor(input_ids, scores)
        return scores


def token_list(name: str, ids: TokenIds) -> list[int]:
    """Token ids given as one, several or a tensor, as a list. Raises ValueError if one is no non-negative integer."""
    flat = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids
    values = list(flat) if isinstance(flat, Iterable) else [flat]
    if any(not isinstance(value, Integral) or int(value) < 0 for value in values):
        raise ValueError(f"{name} must be one or more token ids, got {ids!r}")
    return [int(value) for value in values]


def _positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}")
    return float(value)


class _TokenIds:
    """Token ids as an index tensor, moved to a device once."""

    def __init__(self, name: str, ids: TokenIds) -> None:
        self.index = torch.tensor(token_list(name, ids), dtype=torch.long)

    def on(self, device: torch.device) -> Tensor:
        if self.index.device != device:
            self.index = self.index.to(device)
        return self.index


class _Ban(LogitsProcessor):
    """Bans the same tokens in every row, at some lengths of the sequence."""

    _tokens: _TokenIds

    def _bans_at(self, length: int) -> bool:
        return True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        return self.ban_(length, scores.clone()) if self._bans_at(length) else scores

    def ban_(self, length: int, scores: Tensor) -> Tensor:
        """Writes the bans for a sequence of that length into `scores`, and returns them."""
        if self._bans_at(length):
            scores.index_fill_(1, self._tokens.on(scores.device), NEGATIVE_INFINITY)
        return scores


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Divides positive scores of tokens already seen by `penalty`, and multiplies negative ones (arXiv 1909.05858)."""

    def __init__(self, penalty: float, prompt_ignore_length: int | None = None) -> None:
        self.penalty = _positive("repetition_penalty", penalty)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = input_ids[:, self.prompt_ignore_length or 0 :]
        picked = scores.gather(1, seen)
        picked = torch.where(picked < 0, picked * self.penalty, picked / self.penalty)
        return scores.scatter(1, seen, picked)


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Raises (`penalty` > 1) or lowers the scores of the tokens of the encoder's input."""

    def __init__(self, penalty: float, encoder_input_ids: Tensor) -> None:
        self._inverse = RepetitionPenaltyLogitsProcessor(1 / _positive("encoder_repetition_penalty", penalty))
        self.encoder_input_ids = encoder_input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._inverse(_rows_for(scores, self.encoder_input_ids), scores)


def _rows_for(scores: Tensor, encoder_input_ids: Tensor) -> Tensor:
    """The encoder's input of every row of scores, where beams and samples make several rows of a prompt."""
    times = scores.shape[0] // encoder_input_ids.shape[0]
    return encoder_input_ids.repeat_interleave(times, dim=0) if times > 1 else encoder_input_ids


def _completions(ngrams: Tensor, prefix: Tensor, vocab_size: int) -> Tensor:
    """Which tokens bool `[B, V]` would complete one of the n-grams `[B, m, n]` after `prefix` `[B, n - 1]`."""
    matches = (ngrams[..., :-1] == prefix.unsqueeze(1)).all(-1)
    # N-grams that do not match ban a column past the vocabulary.
    completions = torch.where(matches, ngrams[..., -1], vocab_size)
    mask = torch.zeros(len(ngrams), vocab_size + 1, dtype=torch.bool, device=ngrams.device)
    return mask.scatter_(1, completions, True)[:, :vocab_size]


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Bans every token that would complete an n-gram the sequence already has."""

    def __init__(self, ngram_size: int) -> None:
        if not isinstance(ngram_size, int) or ngram_size < 1:
            raise ValueError(f"no_repeat_ngram_size must be a positive integer, got {ngram_size!r}")
        self.ngram_size = ngram_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n, length = self.ngram_size, input_ids.shape[1]
        if length < n:
            return scores
        ngrams = input_ids.unfold(1, n, 1)  # [B, length - n + 1, n]
        banned = _completions(ngrams, input_ids[:, length - n + 1 :], scores.shape[1])
        return scores.masked_fill(banned, NEGATIVE_INFINITY)


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Bans every token that would complete an n-gram of the encoder's input.

    Args:
        encoder_ngram_size: n.
        encoder_input_ids: int64 `[B, length]`, one row per prompt; the rows of a prompt follow one another.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor) -> None:
        if not isinstance(encoder_ngram_size, int) or encoder_ngram_size < 1:
            raise ValueError(f"encoder_no_repeat_ngram_size must be a positive integer, got {encoder_ngram_size!r}")
        self.ngram_size = encoder_ngram_size
        self.encoder_input_ids = encoder_input_ids.reshape(-1, encoder_input_ids.shape[-1])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n, length = self.ngram_size, input_ids.shape[1]
        if self.encoder_input_ids.shape[1] < n or length < n - 1:
            return scores
        ngrams = _rows_for(scores, self.encoder_input_ids).unfold(1, n, 1)
        banned = _completions(ngrams, input_ids[:, length - n + 1 :], scores.shape[1])
        return scores.masked_fill(banned, NEGATIVE_INFINITY)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a bias to the last token of each given sequence wherever the tokens before it have just been produced.

    Args:
        sequence_bias: `{(token, ...): bias}`, or the same as a list of `[[token, ...], bias]`.
    """

    def __init__(self, sequence_bias: dict[tuple[int, ...], float] | Iterable[Any]) -> None:
        pairs = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
        self.sequence_bias = {tuple(token_list("sequence_bias", tokens)): float(bias) for tokens, bias in pairs}
        if () in self.sequence_bias:
            raise ValueError(f"sequence_bias must hold sequences of at least one token id, got {sequence_bias!r}")
        self._single: Tensor | None = None
        self._longer: list[tuple[Tensor, int, float]] = []

    def _prepare(self, scores: Tensor) -> Tensor:
        largest = max((max(tokens) for tokens in self.sequence_bias), default=-1)
        if largest >= scores.shape[1]:
            raise ValueError(f"sequence_bias names token {largest}, but the vocabulary has {scores.shape[1]} tokens")
        single = scores.new_zeros(scores.shape[1])
        self._longer = []
        for tokens, bias in self.sequence_bias.items():
            if len(tokens) == 1:
                single[tokens[0]] = bias
            else:
                self._longer.append((torch.tensor(tokens[:-1], device=scores.device), tokens[-1], bias))
        return single

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._single is None:
            self._single = self._prepare(scores)
        bias = self._single.expand_as(scores).clone()
        for prefix, last, value in self._longer:
            if len(prefix) + 1 <= input_ids.shape[1]:
                matches = (input_ids[:, -len(prefix) :] == prefix).all(-1)
                bias[:, last] += torch.where(matches, value, 0.0)
        return scores + bias


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Bans the given token sequences; a sequence that is just an end token is left allowed."""

    def __init__(self, bad_words_ids: list[list[int]], eos_token_id: TokenIds | None = None) -> None:
        ends = set() if eos_token_id is None else set(token_list("eos_token_id", eos_token_id))
        kept = {tuple(word): NEGATIVE_INFINITY for word in bad_words_ids if not (len(word) == 1 and word[0] in ends)}
        super().__init__(kept)


class MinLengthLogitsProcessor(_Ban):
    """Bans the end tokens until the sequence, prompt included, has `min_length` tokens."""

    def __init__(self, min_length: int, eos_token_id: TokenIds) -> None:
        if not isinstance(min_length, int) or min_length < 0:
            raise ValueError(f"min_length must be a non-negative integer, got {min_length!r}")
        self.min_length = min_length
        self._tokens = _TokenIds("eos_token_id", eos_token_id)

    def _bans_at(self, length: int) -> bool:
        return length < self.min_length


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """Bans the end tokens until `min_new_tokens` have followed the prompt."""

    def __init__(self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: TokenIds) -> None:
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id)


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allows only the tokens that `prefix_allowed_tokens_fn(prompt index, ids [length])` lists.

    Raises:
        ValueError: the function lists no token.
    """

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]], num_beams: int) -> None:
        self._allowed = prefix_allowed_tokens_fn
        self._num_beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, NEGATIVE_INFINITY)
        for row, ids in enumerate(input_ids):
            allowed = self._allowed(row // self._num_beams, ids)
            if len(allowed) == 0:
                raise ValueError(f"prefix_allowed_tokens_fn allowed no token for prompt {row // self._num_beams}")
            mask[row, allowed] = 0
        return scores + mask


def _only(tokens: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, NEGATIVE_INFINITY).index_fill_(1, tokens, 0.0)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Makes the second token of the sequence `bos_token_id`."""

    def __init__(self, bos_token_id: int) -> None:
        self._tokens = _TokenIds("forced_bos_token_id", bos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _only(self._tokens.on(scores.device), scores) if input_ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Makes the last token that `max_length` leaves room for one of `eos_token_id`."""

    def __init__(self, max_length: int, eos_token_id: TokenIds) -> None:
        self.max_length = max_length
        self._tokens = _TokenIds("forced_eos_token_id", eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids.shape[1] == self.max_length - 1
        return _only(self._tokens.on(scores.device), scores) if last else scores


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replaces NaN by 0 and the infinities by the largest finite values."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num()


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raises the end tokens' scores by `|score| (factor ** n - 1)`, n tokens after the start.

    Args:
        exponential_decay_length_penalty: `(start, factor)`, the start counted from the end of the prompt.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: TokenIds,
        input_ids_seq_length: int,
    ) -> None:
        start, self.factor = exponential_decay_length_penalty
        self.start = start + input_ids_seq_length
        self._ends = _TokenIds("eos_token_id", eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        past = input_ids.shape[1] - self.start
        if past <= 0:
            return scores
        ends = self._ends.on(scores.device)
        picked = scores[:, ends]
        raised = picked + picked.abs() * (self.factor**past - 1)
        # A banned end token stays banned: minus infinity plus infinity would be NaN.
        return scores.index_copy(1, ends, torch.where(picked.isinf(), picked, raised))


class SuppressTokensLogitsProcessor(_Ban):
    """Bans the given tokens."""

    def __init__(self, suppress_tokens: Sequence[int]) -> None:
        self._tokens = _TokenIds("suppress_tokens", suppress_tokens)


class SuppressTokensAtBeginLogitsProcessor(SuppressTokensLogitsProcessor):
    """Bans the given tokens where the sequence has `begin_index` tokens, that is, as the first generated one."""

    def __init__(self, begin_suppress_tokens: Sequence[int], begin_index: int) -> None:
        super().__init__(begin_suppress_tokens)
        self.begin_index = begin_index

    def _bans_at(self, length: int) -> bool:
        return length == self.begin_index
