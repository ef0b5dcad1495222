"""What tokenizers of translation models share: a text begins, or ends, with the token of its language."""

from __future__ import annotations

from typing import Any, ClassVar

from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.encoding import BatchEncoding
from moekernels.tokenizers.languages import unknown_language
from moekernels.tokenizers.options import EncodeOptions


class TranslationTokenizer(PreTrainedTokenizerBase):
    """A tokenizer with a source and a target language.

    `set_languages` is for the end of a constructor. `prefix_tokens` and `suffix_tokens` are what stands around a text
    of the source language.
    """

    default_src_lang: ClassVar[str]
    default_tgt_lang: ClassVar[str]
    #: The token of the language goes to the end, after the end of text.
    legacy_behaviour: bool = False

    def set_languages(self, src_lang: str | None, tgt_lang: str | None) -> None:
        """Sets both languages; None is the default source language, and no target language."""
        self.src_lang = self.default_src_lang if src_lang is None else src_lang
        self.tgt_lang = tgt_lang

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The id of each language's token."""
        raise NotImplementedError

    def get_lang_id(self, lang: str) -> int:
        """The id of a language's token, which `generate` takes as `forced_bos_token_id`.

        Raises:
            ValueError: the code is unknown; the message names near ones.
        """
        ids = self.lang_code_to_id
        if lang not in ids:
            raise unknown_language(lang, ids)
        return ids[lang]

    @property
    def src_lang(self) -> str:
        """The language of the texts; setting an unknown one raises ValueError."""
        return self._src_lang

    @src_lang.setter
    def src_lang(self, lang: str) -> None:
        self.set_src_lang_special_tokens(lang)
        self._src_lang = lang

    @property
    def tgt_lang(self) -> str | None:
        """The language of the target texts, if set; setting an unknown one raises ValueError."""
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, lang: str | None) -> None:
        if lang is not None:
            self.get_lang_id(lang)
        self._tgt_lang = lang

    def set_src_lang_special_tokens(self, src_lang: str) -> None:
        """Makes `prefix_tokens` and `suffix_tokens` those of a source language."""
        self.prefix_tokens, self.suffix_tokens = self._around(src_lang)

    def set_tgt_lang_special_tokens(self, tgt_lang: str) -> None:
        """Makes `prefix_tokens` and `suffix_tokens` those of a target language."""
        self.prefix_tokens, self.suffix_tokens = self._around(tgt_lang)

    def _around(self, lang: str) -> tuple[list[int], list[int]]:
        """The ids that stand before and after a text of a language."""
        language, end = self.get_lang_id(lang), self.convert_tokens_to_ids(self.eos_token)
        return ([], [end, language]) if self.legacy_behaviour else ([language], [end])

    # A call says which language it is about, and changes nothing: other threads may call meanwhile.

    def _in_language(self, options: EncodeOptions, lang: str | None, is_target: bool = False) -> EncodeOptions:
        if lang is None:
            lang = self.tgt_lang if is_target else self.src_lang
        if lang is None:
            raise ValueError("target texts need a target language: set tokenizer.tgt_lang, or pass tgt_lang to it")
        options.around = self._around(lang)
        return options

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one text, or of two without anything between them, with the language and the end of text.

        The ids become `[language] X [eos]`, or `X [eos] [language]` with `legacy_behaviour`, for source and target.
        """
        return self.prefix_tokens + token_ids_0 + (token_ids_1 or []) + self.suffix_tokens

    def _surrounded(self, ids: list[int], pair: list[int] | None, options: EncodeOptions) -> list[int]:
        assert options.around is not None  # the options of every call say it
        before, after = options.around
        return before + ids + (pair or []) + after

    def prepare_seq2seq_batch(
        self,
        src_texts: list[str],
        src_lang: str | None = None,
        tgt_texts: list[str] | None = None,
        tgt_lang: str | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        padding: bool | str = "longest",
        return_tensors: str | None = None,
        truncation: bool | str = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Sets both languages and encodes source texts, and target texts as `labels`.

        Calling the tokenizer with `text_target` does the same; this is its older form. The languages are the
        tokenizer's defaults if None, and `max_target_length` is `max_length` if None.
        """
        self.src_lang = self.default_src_lang if src_lang is None else src_lang
        self.tgt_lang = self.default_tgt_lang if tgt_lang is None else tgt_lang
        options = {"padding": padding, "truncation": truncation, "return_tensors": return_tensors, **kwargs}
        inputs = self(src_texts, max_length=max_length, **options)
        if tgt_texts is not None:
            length = max_length if max_target_length is None else max_target_length
            inputs["labels"] = self(text_target=tgt_texts, max_length=length, **options)["input_ids"]
        return inputs

    def _build_translation_inputs(
        self, raw_inputs: Any, src_lang: str | None, tgt_lang: str | None, **kwargs: Any
    ) -> BatchEncoding:
        """Texts of a language with what makes `generate` translate them to another: `model.generate(**inputs)`.

        Raises:
            ValueError: a language is missing or unknown.
        """
        if src_lang is None or tgt_lang is None:
            raise ValueError(f"translation needs src_lang and tgt_lang, got {src_lang!r} and {tgt_lang!r}")
        target = self.get_lang_id(tgt_lang)
        inputs = self(raw_inputs, add_special_tokens=True, src_lang=src_lang, **kwargs)
        inputs["forced_bos_token_id"] = target
        return inputs

    def _saved_settings(self) -> dict[str, Any]:
        return {**super()._saved_settings(), "src_lang": self.src_lang, "tgt_lang": self.tgt_lang}
