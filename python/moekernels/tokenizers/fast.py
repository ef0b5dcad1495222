"""Tokenizers that the `tokenizers` package runs, from a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer

from moekernels.tokenizers.backends import Backends
from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.files import TOKENIZER_NAME, added_tokens_settings
from moekernels.tokenizers.options import DO_NOT_PAD, DO_NOT_TRUNCATE, MAX_LENGTH, EncodeOptions


class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    """A tokenizer read from `tokenizer.json`. Gives the ids transformers' class of the same name gives.

    Args:
        tokenizer_file: path of a `tokenizer.json`.
        tokenizer_object: a `tokenizers.Tokenizer` instead; it is copied.
        added_tokens_decoder: tokens to add where they are missing, by id.
        add_prefix_space: put a space before the first word, for tokenizers whose words carry their space.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        ValueError: neither or both of file and object are given, or the file is no tokenizer.
    """

    is_fast: ClassVar[bool] = True
    vocab_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": TOKENIZER_NAME}

    def __init__(
        self,
        *,
        tokenizer_file: str | Path | None = None,
        tokenizer_object: Tokenizer | None = None,
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        add_prefix_space: bool | None = False,
        **kwargs: Any,
    ) -> None:
        if (tokenizer_file is None) == (tokenizer_object is None):
            raise ValueError(f"{type(self).__name__} needs either tokenizer_file or tokenizer_object")
        if tokenizer_object is not None:
            self._backends = Backends(Tokenizer.from_str(tokenizer_object.to_str()))
        else:
            try:
                self._backends = Backends(Tokenizer.from_file(str(tokenizer_file)))
            except BaseException as error:  # the package raises no class of its own, and some that are no Exception
                if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                    raise
                raise ValueError(f"{tokenizer_file} is not a tokenizer.json: {error}") from error
        for name, value in self._settings_of_file().items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)
        self.add_prefix_space = bool(add_prefix_space)
        self._backends.main.encode_special_tokens = self.split_special_tokens
        self._add_missing_tokens(added_tokens_decoder or {})
        self._set_prefix_space(self.add_prefix_space)

    def _settings_of_file(self) -> dict[str, Any]:
        """What the file says about padding and truncation; both are switched on per call."""
        settings: dict[str, Any] = {}
        backend = self._backends.main
        truncation, padding = backend.truncation, backend.padding
        if truncation is not None:
            settings["truncation_side"] = truncation["direction"]
        if padding is not None:
            settings["pad_token"] = padding["pad_token"]
            settings["padding_side"] = padding["direction"]
        backend.no_truncation()
        backend.no_padding()
        return settings

    def _add_missing_tokens(self, added_tokens_decoder: dict[int, AddedToken]) -> None:
        present = {str(token): repr(token) for token in self.added_tokens_decoder.values()}
        missing: dict[str, str | AddedToken] = {}
        for _, token in sorted(added_tokens_decoder.items()):
            if present.get(str(token)) != repr(token):
                missing[str(token)] = token
        for special in self.all_special_tokens_extended:
            if str(special) not in present:
                missing.setdefault(str(special), special)
        if missing:
            specials = set(self.all_special_tokens)
            self._add_tokens([_flagged(token, str(token) in specials) for token in missing.values()])

    def _set_prefix_space(self, add_prefix_space: bool) -> None:
        pre_tokenizer = self._backends.main.pre_tokenizer
        if pre_tokenizer is None:
            return
        # The part alone: to write out a whole tokenizer takes memory by its largest id, whatever the file says that is.
        state = json.loads(pre_tokenizer.__getstate__())
        if state.get("add_prefix_space", add_prefix_space) != add_prefix_space:
            pre_tokenizer.add_prefix_space = add_prefix_space
            self._backends.main.pre_tokenizer = pre_tokenizer

    # The table of tokens.

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer`. Change it only while no other thread uses this tokenizer."""
        self._backends.forget_copies()
        return self._backends.main

    #: The name that it has in transformers.
    _tokenizer = backend_tokenizer

    @property
    def vocab_size(self) -> int:
        return self._backends.main.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backends.main.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        return self._backends.main.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to token, of those that are never split."""
        return self._backends.main.get_added_tokens_decoder()

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or of each in a list; that of the unknown token for others."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backends.main.token_to_id(tokens)
        if index is None and tokens != self.unk_token:
            return self.unk_token_id
        return index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or of each in a list; None for ids past the vocabulary."""
        backend = self._backends.main
        if isinstance(ids, int):
            return backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [backend.id_to_token(int(index)) for index in ids if int(index) not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        decoder = self._backends.main.decoder
        return decoder.decode(tokens) if decoder is not None else " ".join(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens `add_special_tokens` adds to a text, or to a pair."""
        return self._backends.main.num_special_tokens_to_add(pair)

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        with self._backends.changing() as backend:
            return backend.add_tokens(tokens)

    # Encoding and decoding.

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of one text, as strings. A character the model does not know is a token here."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def _encode_batch(
        self, texts: Sequence[Any], options: EncodeOptions
    ) -> tuple[dict[str, list[Any]], list[Any] | None]:
        backends = self._backends
        lent = backends.take()
        backend = lent[0]
        try:
            self._configure(backend, options)
            rows = backend.encode_batch(
                texts, add_special_tokens=options.add_special_tokens, is_pretokenized=options.pretokenized
            )
        except Exception as error:  # as above
            raise ValueError(
                f"cannot encode with {options.truncation} to {options.max_length} tokens: {error}"
            ) from error
        finally:
            backends.give(lent)
        return _entries(rows, options)

    def _configure(self, backend: Tokenizer, options: EncodeOptions) -> None:
        """Sets what the package keeps as state of a tokenizer, not as arguments of a call."""
        if options.truncation == DO_NOT_TRUNCATE:
            backend.no_truncation()
        else:
            assert options.max_length is not None  # without one, the options say not to truncate
            backend.enable_truncation(
                options.max_length, stride=options.stride, strategy=options.truncation, direction=self.truncation_side
            )
        if options.padding == DO_NOT_PAD:
            backend.no_padding()
        else:
            backend.enable_padding(
                direction=options.padding_side,
                pad_id=self.pad_token_id,
                pad_type_id=self.pad_token_type_id,
                pad_token=self.pad_token,
                length=options.max_length if options.padding == MAX_LENGTH else None,
                pad_to_multiple_of=options.pad_to_multiple_of,
            )
        backend.encode_special_tokens = options.split_special_tokens

    def _decode(self, token_ids: list[int], skip_special_tokens: bool, between: str) -> str:
        backends = self._backends
        # What `take` would do, without the cost of a call: a decoded token is a matter of microseconds.
        if backends.main_is_lent.acquire(False):
            try:
                return backends.main.decode(token_ids, skip_special_tokens=skip_special_tokens)
            finally:
                backends.main_is_lent.release()
        lent = backends.take()
        try:
            return lent[0].decode(token_ids, skip_special_tokens=skip_special_tokens)
        finally:
            self._backends.give(lent)

    # Files.

    def _save(self, directory: Path) -> list[Path]:
        lent = self._backends.take()
        try:
            self._configure(lent[0], self._in_language(EncodeOptions(), None))
            lent[0].save(str(directory / TOKENIZER_NAME))
        finally:
            self._backends.give(lent)
        return [directory / TOKENIZER_NAME]

    def _saved_settings(self) -> dict[str, Any]:
        settings = added_tokens_settings(self.added_tokens_decoder)
        if self.add_prefix_space:
            settings["add_prefix_space"] = True
        return settings


def _entries(rows: Sequence[Any], options: EncodeOptions) -> tuple[dict[str, list[Any]], list[Any]]:
    """The entries that the options ask for, of encodings with what overflows from them, and their offsets."""
    encodings, samples = [], []
    for sample, row in enumerate(rows):
        parts = [row, *row.overflowing] if options.overflowing_tokens else [row]
        encodings += parts
        samples += [sample] * len(parts)
    entries: dict[str, list[Any]] = {"input_ids": [encoding.ids for encoding in encodings]}
    if options.token_type_ids:
        entries["token_type_ids"] = [encoding.type_ids for encoding in encodings]
    if options.attention_mask:
        entries["attention_mask"] = [encoding.attention_mask for encoding in encodings]
    if options.special_tokens_mask:
        entries["special_tokens_mask"] = [encoding.special_tokens_mask for encoding in encodings]
    if options.offsets_mapping:
        entries["offset_mapping"] = [encoding.offsets for encoding in encodings]
    if options.length:
        entries["length"] = [len(encoding.ids) for encoding in encodings]
    if options.overflowing_tokens:
        entries["overflow_to_sample_mapping"] = samples
    return entries, encodings


def _flagged(token: str | AddedToken, special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special)
    token.special = special or token.special
    return token
