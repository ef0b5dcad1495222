"""The tokenizers of NLLB and NLLB-MoE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from moekernels.tokenizers.fast import PreTrainedTokenizerFast
from moekernels.tokenizers.languages import FLORES_200
from moekernels.tokenizers.options import EncodeOptions
from moekernels.tokenizers.sentencepiece_base import SPACE, SentencePieceTokenizer
from moekernels.tokenizers.special_tokens import NAMES
from moekernels.tokenizers.translation import TranslationTokenizer

# The model begins with <s> <pad> </s> <unk>, its sentencepiece file with <unk> <s> </s>.
_OFFSET = 1
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


class _NllbTokenizer(TranslationTokenizer):
    """Languages by their FLORES-200 codes, which are tokens; others of that form may have been added."""

    model_input_names = ("input_ids", "attention_mask")
    default_src_lang = "eng_Latn"
    default_tgt_lang = "fra_Latn"

    #: None until it is asked for, and again after tokens were added.
    _lang_code_to_id: dict[str, int] | None = None

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        ids = self._lang_code_to_id
        if ids is None:
            # All that were ever added: `additional_special_tokens` may have been replaced by others.
            added = self.added_tokens_encoder
            ids = self._lang_code_to_id = {code: i for code, i in added.items() if _LANGUAGE.fullmatch(code)}
        return ids

    def get_lang_id(self, lang: str) -> int:
        """The id of a language's token, also of one that was added under a code of another form.

        Raises:
            ValueError: the code is unknown; the message names near ones.
        """
        if lang not in self.lang_code_to_id:
            roles = [getattr(self, name) for name in NAMES]
            added = self.added_tokens_encoder
            if lang in added and lang not in roles:
                return added[lang]
        return super().get_lang_id(lang)

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        count = super()._add_tokens(tokens)
        self._lang_code_to_id = None
        return count

    def _saved_settings(self) -> dict[str, Any]:
        return {**super()._saved_settings(), "legacy_behaviour": self.legacy_behaviour}


class NllbTokenizer(_NllbTokenizer, SentencePieceTokenizer):
    """sentencepiece with the languages of FLORES-200 as tokens: `fra_Latn`.

    A text becomes `[language] X [eos]`, as source and as target; with `legacy_behaviour`, `X [eos] [language]`.

    Args:
        vocab_file: path of the sentencepiece model.
        bos_token, eos_token, sep_token, cls_token, unk_token, pad_token, mask_token: special tokens.
        src_lang: language of the texts, `"eng_Latn"` if None.
        tgt_lang: language of the target texts.
        sp_model_kwargs: for `sentencepiece.SentencePieceProcessor`, for instance to sample segmentations.
        additional_special_tokens: the languages and further tokens; those of FLORES-200 too where none of them is among
            them.
        legacy_behaviour: put the language last, as the first release of the models did.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no sentencepiece model, or a language is unknown.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "sentencepiece.bpe.model"}

    def __init__(
        self,
        vocab_file: str | Path,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        sep_token: str | AddedToken = "</s>",
        cls_token: str | AddedToken = "<s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<pad>",
        mask_token: str | AddedToken = "<mask>",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        legacy_behaviour: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            spm_file=vocab_file,
            sp_model_kwargs=sp_model_kwargs,
            bos_token=bos_token,
            eos_token=eos_token,
            sep_token=sep_token,
            cls_token=cls_token,
            unk_token=unk_token,
            pad_token=pad_token,
            mask_token=_mask(mask_token),
            additional_special_tokens=_with_languages(additional_special_tokens),
            **kwargs,
        )
        self.legacy_behaviour = legacy_behaviour
        self.set_languages(src_lang, tgt_lang)

    def _default_tokens(self) -> dict[int, AddedToken]:
        first = [self.bos_token, self.pad_token, self.eos_token, self.unk_token]
        # Languages that the models did not begin with come after the mask, like any other token.
        languages = [token for token in self.additional_special_tokens if token in FLORES_200]
        tokens = {**dict(enumerate(first)), **dict(enumerate(languages, start=self.vocab_size))}
        return {i: AddedToken(t, normalized=False, special=True) for i, t in tokens.items() if t is not None}

    @property
    def vocab_size(self) -> int:
        """Number of pieces and of the first special tokens; languages and `<mask>` come on top."""
        return self.sp_model.get_piece_size() + _OFFSET

    def _piece_to_id(self, piece: str) -> int:
        index = self.sp_model.piece_to_id(piece)
        return index + _OFFSET if index else self._added.ids[str(self.unk_token)]

    def _id_to_piece(self, index: int) -> str | None:
        return self.sp_model.id_to_piece(index - _OFFSET) if _OFFSET <= index < self.vocab_size else None

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        return "".join(tokens).replace(SPACE, " ").strip()


class NllbTokenizerFast(_NllbTokenizer, PreTrainedTokenizerFast):
    """The same from a `tokenizer.json`.

    Args:
        mask_token, src_lang, tgt_lang, additional_special_tokens, legacy_behaviour: as for :class:`NllbTokenizer`.
        **kwargs: as for :class:`PreTrainedTokenizerFast`.

    Raises:
        ValueError: the file is no tokenizer, or a language is unknown.
    """

    def __init__(
        self,
        *,
        mask_token: str | AddedToken = "<mask>",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        legacy_behaviour: bool = False,
        **kwargs: Any,
    ) -> None:
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
        self._templates: dict[tuple[int | None, ...], TemplateProcessing] = {}
        super().__init__(
            **{**defaults, "unk_token": "<unk>", "pad_token": "<pad>", **kwargs},
            mask_token=_mask(mask_token),
            additional_special_tokens=_with_languages(additional_special_tokens),
        )
        self.legacy_behaviour = legacy_behaviour
        self.set_languages(src_lang, tgt_lang)

    def set_src_lang_special_tokens(self, src_lang: str) -> None:
        """Makes what stands around a text that of a source language."""
        super().set_src_lang_special_tokens(src_lang)
        with self._backends.changing() as backend:
            backend.post_processor = self._template(self.prefix_tokens, self.suffix_tokens)

    def _configure(self, backend: Tokenizer, options: EncodeOptions) -> None:
        super()._configure(backend, options)
        assert options.around is not None  # the options of every call say it
        backend.post_processor = self._template(*options.around)

    def _template(self, before: list[int], after: list[int]) -> TemplateProcessing:
        """What puts ids before and after a text."""
        key = (*before, None, *after)
        if key not in self._templates:
            prefix, suffix = self.convert_ids_to_tokens(before), self.convert_ids_to_tokens(after)
            self._templates[key] = TemplateProcessing(
                single=[*prefix, "$A", *suffix],
                pair=[*prefix, "$A", "$B", *suffix],
                special_tokens=list(zip(prefix + suffix, before + after, strict=True)),
            )
        return self._templates[key]


def _mask(token: str | AddedToken) -> AddedToken:
    """The mask stands for a word, and takes the space before it."""
    return AddedToken(token, lstrip=True, normalized=True, special=True) if isinstance(token, str) else token


def _with_languages(tokens: Sequence[str | AddedToken] | None) -> list[str | AddedToken]:
    given = list(tokens or [])
    return given if any(str(token) in FLORES_200 for token in given) else given + list(FLORES_200)
