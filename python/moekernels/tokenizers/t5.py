"""The tokenizers of T5 and Switch Transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken

from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.fast import PreTrainedTokenizerFast
from moekernels.tokenizers.sentencepiece_base import SPACE
from moekernels.tokenizers.space_prefix import SpacePrefixTokenizer

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


class _Sentinels(PreTrainedTokenizerBase):
    """Tokens that stand for a missing span: `<extra_id_0>`, `<extra_id_1>` and so on."""

    def get_sentinel_tokens(self) -> list[str]:
        """The sentinel tokens, in the order of their numbers."""
        found = [match for token in self.additional_special_tokens if (match := _SENTINEL.fullmatch(token))]
        return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]

    def get_sentinel_token_ids(self) -> list[int]:
        """Their ids, which fall as their numbers rise."""
        return self.convert_tokens_to_ids(self.get_sentinel_tokens())


class T5Tokenizer(_Sentinels, SpacePrefixTokenizer):
    """sentencepiece with sentinel tokens, which number downwards from the end of the vocabulary.

    A text becomes `X [eos]`, a pair `A [eos] B [eos]`.

    Args:
        vocab_file: path of the sentencepiece model.
        eos_token, unk_token, pad_token: special tokens.
        extra_ids: number of sentinel tokens.
        additional_special_tokens: further special tokens; where sentinels are among them, there must be `extra_ids`.
        sp_model_kwargs: for `sentencepiece.SentencePieceProcessor`, for instance to sample segmentations.
        legacy: put a space before the text after every special token, as T5 and Switch were trained; True if None.
        add_prefix_space: without `legacy`, put a space before the text.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no sentencepiece model, or the number of sentinels is not `extra_ids`.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "spiece.model"}

    def __init__(
        self,
        vocab_file: str | Path,
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<pad>",
        extra_ids: int = 100,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        legacy: bool | None = None,
        add_prefix_space: bool = True,
        **kwargs: Any,
    ) -> None:
        self.extra_ids = extra_ids
        super().__init__(
            spm_file=vocab_file,
            sp_model_kwargs=sp_model_kwargs,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            additional_special_tokens=_with_sentinels(additional_special_tokens, extra_ids),
            legacy=legacy,
            add_prefix_space=add_prefix_space,
            **kwargs,
        )

    def _default_tokens(self) -> dict[int, AddedToken]:
        last = self.vocab_size + self.extra_ids - 1
        return {
            last - number: AddedToken(f"<extra_id_{number}>", lstrip=True, rstrip=True, normalized=False, special=True)
            for number in range(self.extra_ids)
        }

    def _end(self, token_ids: list[int]) -> list[int]:
        """The end of text, unless the ids have it."""
        return [] if token_ids and token_ids[-1] == self.eos_token_id else [self.convert_tokens_to_ids(self.eos_token)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one or two texts, with the end of text after each that does not have it."""
        first = token_ids_0 + self._end(token_ids_0)
        return first if token_ids_1 is None else first + token_ids_1 + self._end(token_ids_1)

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [bit for ids in texts for bit in [0] * len(ids) + [1] * len(self._end(ids))]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special tokens stay as they are, after a space."""
        tokens = list(tokens)
        if tokens and self.add_prefix_space:
            tokens[0] = tokens[0].removeprefix(SPACE)
        special = set(self.all_special_tokens)
        text, after_special = "", False
        run: list[str] = []
        for token in tokens:
            if token in special:
                text += ("" if after_special else " ") + self.sp_model.decode(run) + token
                run, after_special = [], True
            else:
                run.append(token)
                after_special = False
        return (text + self.sp_model.decode(run)).strip()

    def _saved_settings(self) -> dict[str, Any]:
        return {**super()._saved_settings(), "extra_ids": self.extra_ids}


class T5TokenizerFast(_Sentinels, PreTrainedTokenizerFast):
    """The same from a `tokenizer.json`.

    Args:
        extra_ids, additional_special_tokens: as for :class:`T5Tokenizer`.
        **kwargs: as for :class:`PreTrainedTokenizerFast`.

    Raises:
        ValueError: the file is no tokenizer, or the number of sentinels is not `extra_ids`.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        *,
        extra_ids: int = 100,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            **{"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **kwargs},
            additional_special_tokens=_with_sentinels(additional_special_tokens, extra_ids),
        )
        self.extra_ids = extra_ids

    def _saved_settings(self) -> dict[str, Any]:
        return {**super()._saved_settings(), "extra_ids": self.extra_ids}


def _with_sentinels(tokens: Sequence[str | AddedToken] | None, extra_ids: int) -> list[str | AddedToken]:
    given = list(tokens or [])
    count = sum("<extra_id_" in str(token) for token in given)
    if count == 0:
        return given + [f"<extra_id_{number}>" for number in range(extra_ids)]
    if extra_ids > 0 and count != extra_ids:
        raise ValueError(
            f"additional_special_tokens has {count} sentinels <extra_id_...>, but extra_ids is {extra_ids}"
        )
    return given
