"""Ids without special tokens, made into what a model takes: cut, surrounded by special tokens, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.encoding import BatchEncoding
from moekernels.tokenizers.options import DO_NOT_TRUNCATE, LONGEST_FIRST, EncodeOptions


class RowsOfIds(PreTrainedTokenizerBase):
    """The second half of encoding, of tokenizers that build their inputs themselves."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one or two texts with the special tokens around them."""
        raise NotImplementedError

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros, as many as the ids with special tokens: the model tells texts not apart by types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens `add_special_tokens` adds to a text, or to a pair."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        *,
        return_tensors: str | None = None,
        prepend_batch_axis: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """What calling the tokenizer does once a text is ids: cuts them, adds special tokens and pads.

        Args:
            ids, pair_ids: of a text and of its pair, as `convert_tokens_to_ids(tokenize(text))` gives them.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            prepend_batch_axis: return tensors `[1, length]` instead of `[length]`.
            **options: the keywords of a call that are about ids: `add_special_tokens`, `padding`, `truncation`,
                `max_length`, `stride`, `pad_to_multiple_of`, `padding_side`, `verbose`, and `return_...`.

        Raises:
            ValueError: the arguments do not fit together, or there is no padding token to pad with.
        """
        resolved = self._in_language(self._options(**options), None, self._is_in_target_mode())
        entries = self._encode_rows([(list(ids), None if pair_ids is None else list(pair_ids))], resolved)
        self._warn_if_too_long(len(entries["input_ids"][0]), resolved)
        if not (prepend_batch_axis and return_tensors is not None):
            entries = {name: rows[0] for name, rows in entries.items()}
        return BatchEncoding(entries, tensor_type=return_tensors)

    def _encode_rows(
        self, rows_of_ids: Sequence[tuple[list[int], list[int] | None]], options: EncodeOptions
    ) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {name: [] for name in self._entry_names(options)}
        for first, second in rows_of_ids:
            for name, value in self._encode_row(first, second, options).items():
                if name in rows:
                    rows[name].append(value)
        padded = self.pad(
            rows,
            padding=options.padding,
            max_length=options.max_length,
            pad_to_multiple_of=options.pad_to_multiple_of,
            padding_side=options.padding_side,
            return_attention_mask=options.attention_mask,
        )
        if options.length:
            padded["length"] = [len(ids) for ids in padded["input_ids"]]
        return dict(padded)

    @staticmethod
    def _entry_names(options: EncodeOptions) -> list[str]:
        optional = {
            "token_type_ids": options.token_type_ids,
            "special_tokens_mask": options.special_tokens_mask,
            "overflowing_tokens": options.overflowing_tokens,
            "num_truncated_tokens": options.overflowing_tokens,
        }
        return ["input_ids", *(name for name, wanted in optional.items() if wanted)]

    def _surrounded(self, ids: list[int], pair: list[int] | None, options: EncodeOptions) -> list[int]:
        """:meth:`build_inputs_with_special_tokens` for one call."""
        return self.build_inputs_with_special_tokens(ids, pair)

    def _encode_row(self, ids: list[int], pair: list[int] | None, options: EncodeOptions) -> dict[str, Any]:
        has_pair = pair is not None
        total = len(ids) + len(pair or [])
        if options.add_special_tokens:
            total += self.num_special_tokens_to_add(has_pair)
        overflowing: list[int] = []
        excess = 0
        if options.truncation != DO_NOT_TRUNCATE and options.max_length is not None and total > options.max_length:
            excess = total - options.max_length
            ids, pair, overflowing = self._truncated(ids, pair, excess, options)
        if options.add_special_tokens:
            row = self._surrounded(ids, pair, options)
            types = self.create_token_type_ids_from_sequences(ids, pair)
            mask = self.get_special_tokens_mask(ids, pair)
        else:
            row = ids + (pair or [])
            types, mask = [0] * len(row), [0] * len(row)
        return {
            "input_ids": row,
            "token_type_ids": types,
            "special_tokens_mask": mask,
            "overflowing_tokens": overflowing,
            "num_truncated_tokens": excess,
        }

    def _truncated(
        self, ids: list[int], pair: list[int] | None, excess: int, options: EncodeOptions
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """A text and its pair without `excess` tokens, and what was cut off where one of the two lost it all."""
        strategy = options.truncation
        if strategy == LONGEST_FIRST and pair is not None:
            from_first, from_second = _shares(len(ids), len(pair), excess)
            if from_first <= len(ids) and from_second <= len(pair):
                return self._cut(ids, from_first), self._cut(pair, from_second), []
        else:
            shortened = pair if strategy == "only_second" else ids
            if shortened is not None and excess <= len(shortened):
                lost = min(len(shortened), excess + options.stride)
                left = self.truncation_side == "left"
                overflowing = shortened[:lost] if left else shortened[len(shortened) - lost :]
                kept = self._cut(shortened, excess)
                return (ids, kept, overflowing) if strategy == "only_second" else (kept, pair, overflowing)
        raise ValueError(
            f"cannot truncate to max_length={options.max_length} with truncation={strategy!r}: {excess} tokens are to "
            f"go from a text of {len(ids)}" + ("" if pair is None else f" and a pair of {len(pair)}")
        )

    def _cut(self, ids: list[int], count: int) -> list[int]:
        return ids[count:] if self.truncation_side == "left" else ids[: len(ids) - count]


def _shares(first: int, second: int, excess: int) -> tuple[int, int]:
    """How many of `excess` tokens each of two texts loses: the longer one first, down to the other's length."""
    uneven = min(abs(first - second), excess)
    rest = excess - uneven
    return (uneven + rest // 2, rest - rest // 2) if first > second else (rest // 2, uneven + rest - rest // 2)
