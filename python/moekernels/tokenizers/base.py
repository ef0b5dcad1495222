"""What all tokenizers share: settings, argument handling, padding, files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from moekernels.checkpoint import TOKENIZER_FILES, CheckpointError, replace_files, resolve, take_hub_options
from moekernels.tokenizers.chat import ChatTemplates
from moekernels.tokenizers.decoding import Decoding
from moekernels.tokenizers.encoding import BatchEncoding, as_list, padded
from moekernels.tokenizers.files import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    SPECIAL_TOKENS_MAP_NAME,
    read_settings,
)
from moekernels.tokenizers.options import (
    DO_NOT_PAD,
    MAX_LENGTH,
    EncodeOptions,
    check_side,
    check_texts,
    resolve_lengths,
    unreadable,
)
from moekernels.tokenizers.special_tokens import ADDITIONAL, NAMES, SpecialTokens
from moekernels.tokenizers.targets import TargetMode

# What "no limit" looks like in files, and what can still be a limit.
NO_MAX_LENGTH = int(1e30)
_LONGEST_LIMIT = int(1e20)
# Settings that say what a file is and where it was.
_PLACES = ("tokenizer_class", "tokenizer_file", "vocab_file", "spm_file", "special_tokens_map_file")

_Self = TypeVar("_Self", bound="PreTrainedTokenizerBase")


class PreTrainedTokenizerBase(SpecialTokens, TargetMode, ChatTemplates, Decoding):
    """Base of all tokenizers. One defines how to encode and decode, its table of tokens, how to load and to save it.

    Args:
        model_max_length: tokens the model can take; None for no limit.
        padding_side, truncation_side: `"right"` or `"left"`; generation needs padding on the left.
        model_input_names: which entries an encoding has; the first holds the ids.
        clean_up_tokenization_spaces: repair spaces before English punctuation when decoding.
        split_special_tokens: treat special tokens in the text like any other text.
        chat_template: Jinja source, or several by name.
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token, additional_special_tokens: tokens.
        **kwargs: kept, and written back to `tokenizer_config.json`.

    Raises:
        ValueError: a side is neither left nor right.
    """

    padding_side: str = "right"
    truncation_side: str = "right"
    model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask")
    pad_token_type_id: int = 0
    is_fast: ClassVar[bool] = False
    #: The files a tokenizer is made of, by the argument of the constructor that takes them.
    vocab_files_names: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        *,
        model_max_length: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_input_names: Sequence[str] | None = None,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        chat_template: str | dict[str, str] | list[dict[str, str]] | None = None,
        name_or_path: str = "",
        **kwargs: Any,
    ) -> None:
        self.model_max_length = NO_MAX_LENGTH if model_max_length is None else model_max_length
        self.padding_side = check_side("padding_side", padding_side or type(self).padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side or type(self).truncation_side)
        self.model_input_names = list(model_input_names or type(self).model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        if isinstance(chat_template, list):
            chat_template = {entry["name"]: entry["template"] for entry in chat_template}
        self.chat_template = chat_template
        self.name_or_path = name_or_path
        tokens = {name: kwargs.pop(name) for name in (*NAMES, ADDITIONAL) if name in kwargs}
        self.init_kwargs = kwargs
        super().__init__(**tokens)

    # What a tokenizer defines.

    def _encode_batch(
        self, texts: Sequence[Any], options: EncodeOptions
    ) -> tuple[dict[str, list[Any]], list[Any] | None]:
        """Encodes texts, or pairs of them, to lists with one entry per row, and their offsets where it knows them."""
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = {
            name: getattr(self, name)
            for name in ("name_or_path", "vocab_size", "model_max_length", "is_fast", "padding_side", "truncation_side")
        }
        shown |= {
            "special_tokens": self.special_tokens_map,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "added_tokens_decoder": self.added_tokens_decoder,
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without added ones."""
        raise NotImplementedError

    def _save(self, directory: Path) -> list[Path]:
        raise NotImplementedError

    def _in_language(self, options: EncodeOptions, lang: str | None, is_target: bool = False) -> EncodeOptions:
        """The options for source or target texts of a language; None is the tokenizer's."""
        if lang is not None:
            raise ValueError(f"{type(self).__name__} knows no languages, got {lang!r}")
        return options

    # Encoding.

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> BatchEncoding:
        """Encodes a text or a batch of texts.

        Args:
            text, text_pair: a string, or a list of them; with `is_split_into_words`, lists of words.
            text_target, text_pair_target: the same for what the model should produce; their ids become `labels`.
            add_special_tokens: add the tokens the model expects around a text.
            padding: True or `"longest"`, `"max_length"`, or False.
            truncation: True or `"longest_first"`, `"only_first"`, `"only_second"`, or False.
            max_length: tokens to pad or truncate to; the model's limit if None.
            stride: tokens that overflowing rows repeat.
            pad_to_multiple_of: pad further, to a multiple.
            padding_side: instead of the tokenizer's.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            return_token_type_ids, return_attention_mask: whether to, instead of what `model_input_names` says.
            return_overflowing_tokens: return what truncation cut off: as more rows, or, by tokenizers that are not
                fast, as `overflowing_tokens` with their number as `num_truncated_tokens`.
            return_special_tokens_mask, return_offsets_mapping, return_length: further entries.
            verbose: warn of texts that are too long for the model.
            src_lang, tgt_lang: the languages of `text` and `text_target` in this call, instead of the tokenizer's.

        Returns:
            The entries: one list per text, or a tensor int64 `[B, length]`. A single text gives bare lists.

        Raises:
            ValueError: the arguments do not fit together, or there is no padding token to pad with.
            TypeError: the text is neither text nor a list of texts.
        """
        if text is None and text_target is None:
            raise ValueError("a tokenizer needs text or text_target")
        options = self._options(
            add_special_tokens,
            padding,
            truncation,
            max_length,
            stride,
            is_split_into_words,
            pad_to_multiple_of,
            padding_side,
            return_token_type_ids,
            return_attention_mask,
            return_overflowing_tokens,
            return_special_tokens_mask,
            return_offsets_mapping,
            return_length,
            split_special_tokens,
            verbose,
        )
        encoding = None
        if text is not None:
            is_target = self._is_in_target_mode()
            lang = tgt_lang if is_target else src_lang
            encoding = self._encode(text, text_pair, self._in_language(options, lang, is_target), return_tensors)
        if text_target is not None:
            target = self._encode(
                text_target, text_pair_target, self._in_language(options, tgt_lang, is_target=True), return_tensors
            )
            if encoding is None:
                return target
            encoding["labels"] = target["input_ids"]
        assert encoding is not None
        return encoding

    def _options(
        self,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> EncodeOptions:
        """The keywords of a call, checked."""
        resolved_padding, resolved_truncation, max_length = self._strategies(
            padding, truncation, max_length, pad_to_multiple_of
        )
        return EncodeOptions(
            add_special_tokens=add_special_tokens,
            padding=resolved_padding,
            truncation=resolved_truncation,
            max_length=max_length,
            stride=stride,
            pretokenized=is_split_into_words,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=check_side("padding_side", padding_side or self.padding_side),
            split_special_tokens=self.split_special_tokens if split_special_tokens is None else split_special_tokens,
            token_type_ids=self._returns("token_type_ids", return_token_type_ids),
            attention_mask=self._returns("attention_mask", return_attention_mask),
            overflowing_tokens=return_overflowing_tokens,
            special_tokens_mask=return_special_tokens_mask,
            offsets_mapping=return_offsets_mapping,
            length=return_length,
            verbose=verbose,
        )

    def _encode(self, text: Any, pair: Any, options: EncodeOptions, return_tensors: str | None) -> BatchEncoding:
        check_texts("text", text)
        if pair is not None:
            check_texts("text_pair", pair)
        batched = isinstance(text, (list, tuple))
        if options.pretokenized:
            batched = batched and len(text) > 0 and isinstance(text[0], (list, tuple))
        if not batched:
            texts = [text if not pair else (text, pair)]
        elif pair is None:
            texts = list(text)
        elif not isinstance(pair, (list, tuple)) or len(pair) != len(text):
            got = f"{len(pair)} texts" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise ValueError(f"text_pair must have one entry for each of the {len(text)} of text, got {got}")
        else:
            texts = list(zip(text, pair, strict=True))
        try:
            entries, encodings = self._encode_batch(texts, options)
        except (RuntimeError, ValueError, TypeError) as error:
            raise unreadable(texts) or error from None
        for ids in entries["input_ids"]:
            self._warn_if_too_long(len(ids), options)
        # What overflows is more rows in fast tokenizers, and an entry of its own in others.
        if not batched and return_tensors is None and not (options.overflowing_tokens and self.is_fast):
            bare = {name for name, rows in entries.items() if isinstance(rows[0], list) or not self.is_fast}
            entries = {name: rows[0] if name in bare else rows for name, rows in entries.items()}
        return BatchEncoding(entries, encodings, tensor_type=return_tensors)

    def encode(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        """The `input_ids` of one text; keywords as for calling the tokenizer."""
        return self(text, text_pair, **kwargs)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """One text, as calling the tokenizer does."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """A batch of texts, or of pairs of them, as calling the tokenizer does."""
        if batch_text_or_text_pairs and isinstance(batch_text_or_text_pairs[0], tuple):
            texts, pairs = zip(*batch_text_or_text_pairs, strict=True)
            return self(list(texts), list(pairs), **kwargs)
        return self(list(batch_text_or_text_pairs), **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of one text, as strings."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens, **kwargs))

    def _returns(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _strategies(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        pad_to_multiple_of: int | None = None,
    ) -> tuple[str, str, int | None]:
        pad, cut, max_length = resolve_lengths(
            padding,
            truncation,
            max_length,
            model_max_length=self.model_max_length if self.model_max_length <= _LONGEST_LIMIT else None,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        if pad != DO_NOT_PAD and self.pad_token_id is None:
            raise ValueError(
                "cannot pad: the tokenizer has no pad_token; set one, for instance "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        return pad, cut, max_length

    def _warn_if_too_long(self, length: int, options: EncodeOptions) -> None:
        if options.verbose and options.max_length is None and length > self.model_max_length:
            warnings.warn(
                f"a text has {length} tokens, more than the {self.model_max_length} the model can take",
                stacklevel=4,
            )

    # Padding what was encoded before.

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads encodings: one, a batch, or a list of single ones such as a data loader collects.

        Raises:
            ValueError: there is no `input_ids`, or no padding token.
        """
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        entries = {name: as_list(value) for name, value in encoded_inputs.items()}
        ids_name = self.model_input_names[0]
        if ids_name not in entries:
            raise ValueError(f"pad needs {ids_name}, got {', '.join(entries) or 'nothing'}")
        how, _, max_length = self._strategies(padding, False, max_length)
        side = check_side("padding_side", padding_side or self.padding_side)
        single = not (entries[ids_name] and isinstance(entries[ids_name][0], (list, tuple)))
        rows = {name: [value] if single else list(value) for name, value in entries.items()}
        lengths = [len(ids) for ids in rows[ids_name]]
        if self._returns("attention_mask", return_attention_mask):
            rows.setdefault("attention_mask", [[1] * length for length in lengths])
        if how != DO_NOT_PAD:
            target = max_length if how == MAX_LENGTH and max_length is not None else max(lengths, default=0)
            if pad_to_multiple_of:
                target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
            fillers = {
                ids_name: self.pad_token_id,
                "attention_mask": 0,
                "token_type_ids": self.pad_token_type_id,
                "special_tokens_mask": 1,
            }
            for name, filler in fillers.items():
                if name in rows:
                    rows[name] = [padded(row, target, filler, side) for row in rows[name]]
        if single:
            rows = {name: value[0] for name, value in rows.items()}
        return BatchEncoding(rows, tensor_type=return_tensors)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    # Files.

    @classmethod
    def from_pretrained(cls: type[_Self], directory: str | os.PathLike[str], **kwargs: Any) -> _Self:
        """Reads a tokenizer from a checkpoint directory, or by name; keywords override what its files say.

        Raises:
            FileNotFoundError: there is no such checkpoint, or no tokenizer in it.
            CheckpointError: a file is not what it should be; the message names it.
        """
        path = resolve(directory, TOKENIZER_FILES, **take_hub_options(kwargs))
        # Nothing that comes with a checkpoint is ever run.
        kwargs.pop("trust_remote_code", None)
        settings = read_settings(path)
        try:
            return cls._load(path, {**settings, **kwargs})
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            if kwargs or str(path) in str(error):  # the fault may be the caller's
                raise
            raise CheckpointError(
                f"{path}: {CONFIG_NAME}, or a file beside it, has a value that {cls.__name__} cannot use: {error}"
            ) from error

    @classmethod
    def _load(cls: type[_Self], directory: Path, settings: dict[str, Any]) -> _Self:
        missing = [name for name in cls.vocab_files_names.values() if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(f"no {' and no '.join(missing)} in {str(directory)!r}, which {cls.__name__} reads")
        # Where the files were when they were saved does not matter now.
        kept = {name: value for name, value in settings.items() if name not in _PLACES}
        files: dict[str, Any] = {argument: directory / name for argument, name in cls.vocab_files_names.items()}
        return cls(**{**kept, **files, "name_or_path": str(directory)})

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Writes the tokenizer's files and returns their paths; `legacy_format` changes nothing.

        They take their place together once all are on disk; until then those that are there stay. A `filename_prefix`
        is put before their names, with a hyphen; to load them again, take it off.
        """
        settings: dict[str, Any] = {
            **self.init_kwargs,
            **self.special_tokens_map,
            "model_max_length": self.model_max_length,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "tokenizer_class": type(self).__name__,
        }
        for name in ("padding_side", "truncation_side", "model_input_names"):
            if getattr(self, name) != _listed(getattr(type(self), name)):
                settings[name] = getattr(self, name)
        if self.split_special_tokens:
            settings["split_special_tokens"] = True
        texts: dict[str, str] = {}
        if isinstance(self.chat_template, dict):
            settings["chat_template"] = [{"name": n, "template": t} for n, t in self.chat_template.items()]
        elif self.chat_template is not None:
            texts[CHAT_TEMPLATE_NAME] = self.chat_template
        settings.update(self._saved_settings())
        for name, content in ((CONFIG_NAME, settings), (SPECIAL_TOKENS_MAP_NAME, self.special_tokens_map)):
            texts[name] = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        with replace_files(directory) as stage:
            for name, text in texts.items():
                (stage / name).write_text(text, encoding="utf-8")
            names = [*texts, *(path.name for path in self._save(stage))]
            if filename_prefix:
                names = [(stage / name).rename(stage / f"{filename_prefix}-{name}").name for name in names]
        return tuple(str(Path(directory) / name) for name in names)

    def _saved_settings(self) -> dict[str, Any]:
        """Further entries of `tokenizer_config.json`."""
        return {}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
