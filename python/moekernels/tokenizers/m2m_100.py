"""The tokenizer of M2M100."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken

from moekernels.checkpoint import CheckpointError, read_json
from moekernels.tokenizers.languages import M2M100, WMT21
from moekernels.tokenizers.sentencepiece_base import SentencePieceTokenizer
from moekernels.tokenizers.translation import TranslationTokenizer

_LANGUAGE = re.compile(r"__(\w+?)__")
LANGUAGE_CODES = {"m2m100": M2M100, "wmt21": WMT21}


class M2M100Tokenizer(TranslationTokenizer, SentencePieceTokenizer):
    """sentencepiece cuts a text into pieces, and a table of its own numbers them; languages are tokens like `__fr__`.

    A text becomes `[language] X [eos]`, as source and as target. Adding a token `__xyz__` adds a language `xyz`.

    Args:
        vocab_file: path of `vocab.json`, pieces to ids.
        spm_file: path of the sentencepiece model.
        src_lang: language of the texts, `"en"` if None.
        tgt_lang: language of the target texts.
        bos_token, eos_token, sep_token, pad_token, unk_token: special tokens.
        language_codes: `"m2m100"` for its 100 languages, `"wmt21"` for 8.
        sp_model_kwargs: for `sentencepiece.SentencePieceProcessor`, for instance to sample segmentations.
        num_madeup_words: ids past the languages that mean nothing, which the model's vocabulary counts.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or a language or `language_codes` is unknown.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "spm_file": "sentencepiece.bpe.model",
    }
    default_src_lang = "en"
    default_tgt_lang = "ro"

    def __init__(
        self,
        vocab_file: str | Path,
        spm_file: str | Path,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        sep_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<pad>",
        unk_token: str | AddedToken = "<unk>",
        language_codes: str = "m2m100",
        sp_model_kwargs: dict[str, Any] | None = None,
        num_madeup_words: int = 8,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        token_type_ids_pattern: str = "bert_style",
        token_type_ids_include_special_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        if language_codes not in LANGUAGE_CODES:
            raise ValueError(f"language_codes must be {' or '.join(LANGUAGE_CODES)}, got {language_codes!r}")
        self.encoder = _read_vocab(vocab_file)
        self.decoder = {index: piece for piece, index in self.encoder.items()}
        if str(unk_token) not in self.encoder:
            raise ValueError(f"{vocab_file} has no unknown token {str(unk_token)!r}")
        self._unk_id = self.encoder[str(unk_token)]
        self.language_codes = language_codes
        self.num_madeup_words = num_madeup_words
        self.token_type_ids_pattern = token_type_ids_pattern
        self.token_type_ids_include_special_tokens = token_type_ids_include_special_tokens
        self.lang_code_to_token = {code: f"__{code}__" for code in LANGUAGE_CODES[language_codes]}
        first = len(self.encoder)
        self.lang_token_to_id = {token: first + i for i, token in enumerate(self.lang_code_to_token.values())}
        self.id_to_lang_token = {index: token for token, index in self.lang_token_to_id.items()}
        self._lang_code_to_id = dict(zip(self.lang_code_to_token, self.id_to_lang_token, strict=True))

        given = list(additional_special_tokens or [])
        listed = {str(token) for token in given}
        super().__init__(
            spm_file=spm_file,
            sp_model_kwargs=sp_model_kwargs,
            bos_token=bos_token,
            eos_token=eos_token,
            sep_token=sep_token,
            pad_token=pad_token,
            unk_token=unk_token,
            additional_special_tokens=given + [token for token in self.lang_token_to_id if token not in listed],
            **kwargs,
        )
        self._find_languages()
        self.set_languages(src_lang, tgt_lang)

    def _default_tokens(self) -> dict[int, AddedToken]:
        tokens = self.id_to_lang_token.items()
        return {index: AddedToken(token, normalized=False, special=True) for index, token in tokens}

    @property
    def vocab_size(self) -> int:
        """Number of pieces; languages and added tokens come on top."""
        return len(self.encoder)

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        return self._lang_code_to_id

    def _find_languages(self) -> None:
        """Makes languages of the added tokens that look like those of languages."""
        for token, index in self.added_tokens_encoder.items():
            match = _LANGUAGE.fullmatch(token)
            if match is not None and match[1] not in self._lang_code_to_id:
                self.lang_code_to_token[match[1]] = token
                self.lang_token_to_id[token] = index
                self.id_to_lang_token[index] = token
                self._lang_code_to_id[match[1]] = index

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        count = super()._add_tokens(tokens)
        self._find_languages()
        return count

    def get_lang_token(self, lang: str) -> str:
        """The token of a language: `__fr__` for `fr`."""
        self.get_lang_id(lang)
        return self.lang_code_to_token[lang]

    def _piece_to_id(self, piece: str) -> int:
        return self.encoder.get(piece, self._unk_id)

    def _id_to_piece(self, index: int) -> str | None:
        return self.decoder.get(index, self.unk_token)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Which text each id belongs to, which the model does not use.

        The first text's ids are 0. Those of the second are 1, or 0 with `token_type_ids_pattern="all_zeros"`.
        `token_type_ids_include_special_tokens` says whether the special tokens count; they belong to the first text.
        """
        second = len(token_ids_1 or [])
        special = self.num_special_tokens_to_add() if self.token_type_ids_include_special_tokens else 0
        value = 1 if self.token_type_ids_pattern == "bert_style" else 0
        return [0] * (len(token_ids_0) + special) + [value] * second

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special tokens stay as they are."""
        special = set(self.all_special_tokens)
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in special:
                text += self.sp_model.decode(run) + token
                run = []
            else:
                run.append(token)
        return (text + self.sp_model.decode(run)).strip()

    def _vocabulary_file(self, argument: str) -> bytes:
        if argument != "vocab_file":
            return super()._vocabulary_file(argument)
        return json.dumps(self.encoder, indent=2, ensure_ascii=False).encode("utf-8")

    def _saved_settings(self) -> dict[str, Any]:
        return {
            **super()._saved_settings(),
            "language_codes": self.language_codes,
            "num_madeup_words": self.num_madeup_words,
        }


def _read_vocab(path: str | Path) -> dict[str, int]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no table of pieces at {str(path)!r}")
    vocab = read_json(Path(path))
    for piece, index in vocab.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise CheckpointError(f"{path}: the id of piece {piece!r} must be a number from 0 on, got {index!r}")
    return vocab
