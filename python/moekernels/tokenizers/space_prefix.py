"""Sentencepiece tokenizers that may leave out the space before what follows a special token."""

from __future__ import annotations

from typing import Any

import sentencepiece

from moekernels.tokenizers.sentencepiece_base import SPACE, SentencePieceTokenizer

# A model's field `normalizer_spec { add_dummy_prefix: false }`: at the end of the file it has the last word.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SpacePrefixTokenizer(SentencePieceTokenizer):
    """A sentencepiece tokenizer whose pieces are those of the model.

    Args:
        legacy: put a space before the text after every special token; True if None.
        add_prefix_space: without `legacy`, put a space before the text.
        **kwargs: as for :class:`SentencePieceTokenizer`.
    """

    def __init__(self, *, legacy: bool | None = None, add_prefix_space: bool = True, **kwargs: Any) -> None:
        self.legacy = legacy is not False
        self.add_prefix_space = add_prefix_space
        super().__init__(**kwargs)
        self._unk_length = len(self.sp_model.encode(str(self.unk_token), out_type=str))

    def _load_sp_model(self) -> sentencepiece.SentencePieceProcessor:
        if self.legacy:
            return super()._load_sp_model()
        processor = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        processor.LoadFromSerializedProto(self._model_proto + _NO_DUMMY_PREFIX)
        return processor

    @property
    def vocab_size(self) -> int:
        """Number of pieces; added tokens come on top."""
        return self.sp_model.get_piece_size()

    def _piece_to_id(self, piece: str) -> int:
        return self.sp_model.piece_to_id(piece)

    def _id_to_piece(self, index: int) -> str | None:
        return self.sp_model.id_to_piece(index) if 0 <= index < self.vocab_size else None

    def _tokens(self, text: str, split_special_tokens: bool) -> list[str]:
        if self.legacy or not text:
            return super()._tokens(text, split_special_tokens)
        text = text.replace(SPACE, " ")
        tokens = super()._tokens(SPACE + text if self.add_prefix_space else text, split_special_tokens)
        # A special token needs no space before it.
        begins = len(tokens) > 1 and tokens[0] == SPACE and tokens[1] in self.all_special_tokens
        return tokens[1:] if begins else tokens

    def _pieces(self, text: str) -> list[str]:
        if self.legacy or not text.startswith((SPACE, " ")):
            return super()._pieces(text)
        # sentencepiece removes a leading space, unless something stands before it.
        pieces = super()._pieces(f"{self.unk_token}{text}")
        return pieces[self._unk_length :] if len(pieces) >= self._unk_length else pieces

    def _saved_settings(self) -> dict[str, Any]:
        return {**super()._saved_settings(), "legacy": self.legacy, "add_prefix_space": self.add_prefix_space}
