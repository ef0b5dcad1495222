"""Tokenizers that sentencepiece runs, with added tokens around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken

from moekernels.checkpoint import replace_files
from moekernels.tokenizers.added_tokens import AddedTokens
from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.files import added_tokens_settings, read_added_tokens
from moekernels.tokenizers.options import EncodeOptions
from moekernels.tokenizers.rows import RowsOfIds

# What sentencepiece puts in place of a space.
SPACE = "\u2581"


class SentencePieceTokenizer(RowsOfIds, PreTrainedTokenizerBase):
    """Base of the tokenizers that read a sentencepiece model. Gives the ids transformers' slow tokenizers give.

    A tokenizer defines how pieces and ids belong together, what special tokens surround a text, and how tokens become
    text again.

    Args:
        spm_file: path of the sentencepiece model.
        sp_model_kwargs: for `sentencepiece.SentencePieceProcessor`: `enable_sampling`, `nbest_size`, `alpha`.
        added_tokens_decoder: added tokens by id, as saved files list them.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no sentencepiece model.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        spm_file: str | Path,
        *,
        sp_model_kwargs: dict[str, Any] | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sp_model_kwargs = dict(sp_model_kwargs or {})
        if not Path(spm_file).is_file():
            raise FileNotFoundError(f"no sentencepiece model at {str(spm_file)!r}")
        self._model_proto = Path(spm_file).read_bytes()
        try:
            self.sp_model = self._load_sp_model()
        except RuntimeError as error:
            raise ValueError(f"{spm_file} is not a sentencepiece model: {error}") from error
        self._added = AddedTokens()
        given = dict(added_tokens_decoder or {})
        contents = {token.content for token in given.values()}
        defaults = self._default_tokens()
        self._added.update({i: t for i, t in defaults.items() if i not in given and t.content not in contents})
        self._added.update(given)
        self.add_tokens(
            [token for token in self.all_special_tokens_extended if str(token) not in self._added.ids],
            special_tokens=True,
        )

    def _load_sp_model(self) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        processor.LoadFromSerializedProto(self._model_proto)
        return processor

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "sp_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sp_model = self._load_sp_model()

    # What a tokenizer defines, besides `vocab_size`.

    def _piece_to_id(self, piece: str) -> int:
        """The id of a piece, that of the unknown token for others."""
        raise NotImplementedError

    def _id_to_piece(self, index: int) -> str | None:
        """The piece of an id; None if it has none."""
        raise NotImplementedError

    def _default_tokens(self) -> dict[int, AddedToken]:
        """The added tokens of the kind of model by id; the files may place them elsewhere."""
        return {}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        raise NotImplementedError

    # The table of tokens.

    def __len__(self) -> int:
        return self.vocab_size + sum(index >= self.vocab_size for index in self._added.by_id)

    def get_vocab(self) -> dict[str, int]:
        vocab = {self.convert_ids_to_tokens(index): index for index in range(self.vocab_size)}
        return {**vocab, **self._added.ids}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to token, of those that are never split."""
        return dict(sorted(self._added.by_id.items()))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or of each in a list; that of the unknown token for others."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._added.ids.get(tokens)
        return self._piece_to_id(tokens) if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or of each in a list; None for ids past the vocabulary."""
        if isinstance(ids, int):
            token = self._added.by_id.get(ids)
            return self._id_to_piece(ids) if token is None else token.content
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.convert_ids_to_tokens(int(index)) for index in ids if int(index) not in skipped]

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        new: dict[int, AddedToken] = {}
        next_id = max(len(self), max(self._added.by_id, default=-1) + 1)
        count = 0
        for content, token in {token.content: token for token in tokens if token.content}.items():
            index = self.convert_tokens_to_ids(content)
            if self.convert_ids_to_tokens(index) != content:
                index, count = next_id + count, count + 1
            new[index] = token
            if token.special and content not in self.all_special_tokens:
                self._additional.append(token)
        self._added.update(new)
        return count

    # Encoding.

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of one text, as strings. A character the model does not know is a token here."""
        if pair is not None or add_special_tokens:
            return super().tokenize(text, pair, add_special_tokens, **kwargs)
        return self._tokens(text, kwargs.get("split_special_tokens", self.split_special_tokens))

    def _tokens(self, text: str, split_special_tokens: bool) -> list[str]:
        tokens: list[str] = []
        for part in [text] if split_special_tokens else self._added.split(text):
            if part in self._added.ids and not split_special_tokens:
                tokens.append(part)
            else:
                tokens += self._pieces(part)
        return tokens

    def _pieces(self, text: str) -> list[str]:
        """The pieces of a text with no added token in it."""
        return self.sp_model.encode(text, out_type=str)

    def _encode_batch(
        self, texts: Sequence[Any], options: EncodeOptions
    ) -> tuple[dict[str, list[Any]], list[Any] | None]:
        if options.offsets_mapping:
            raise ValueError("return_offsets_mapping needs a fast tokenizer: sentencepiece pieces have no offsets")
        return self._encode_rows([self._text_and_pair(text, options) for text in texts], options), None

    def _text_and_pair(self, text: Any, options: EncodeOptions) -> tuple[list[int], list[int] | None]:
        """The ids of a row's text, and of its pair if it has one, without special tokens."""
        words = options.pretokenized and not (len(text) > 0 and isinstance(text[0], (list, tuple)))
        pair = None
        if not isinstance(text, str) and not words:
            if len(text) != 2:
                raise ValueError(f"each text must be a string or a pair of them, got {len(text)} in one")
            text, pair = text
        return self._ids(text, options), None if pair is None else self._ids(pair, options)

    def _ids(self, text: str | Sequence[str], options: EncodeOptions) -> list[int]:
        texts = [text] if isinstance(text, str) else text
        return [
            self.convert_tokens_to_ids(token)
            for part in texts
            for token in self._tokens(part, options.split_special_tokens)
        ]

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special tokens, 0 for others.

        Args:
            token_ids_0, token_ids_1: ids of a text, and of its pair.
            already_has_special_tokens: whether the ids have the special tokens that would else be put around them.
        """
        if not already_has_special_tokens:
            pair = None if token_ids_1 is None else [-1] * len(token_ids_1)
            return [int(index != -1) for index in self.build_inputs_with_special_tokens([-1] * len(token_ids_0), pair)]
        return super().get_special_tokens_mask(token_ids_0, token_ids_1)

    # Decoding.

    def _decode(self, token_ids: list[int], skip_special_tokens: bool, between: str) -> str:
        special = set(self.all_special_tokens)
        additional = set(self.additional_special_tokens)
        # Tokens that were added to the model's own vocabulary stand between spaces.
        apart = {
            content
            for content, index in self._added.ids.items()
            if content not in special or (content in additional and index >= self.vocab_size)
        }
        texts: list[str] = []
        run: list[str] = []
        for token in self.convert_ids_to_tokens(token_ids, skip_special_tokens):
            if token is None or (skip_special_tokens and token in special):
                continue
            if token not in apart:
                run.append(token)
                continue
            if run and (text := self.convert_tokens_to_string(run)):
                texts.append(text)
            run = []
            texts.append(token)
        if run:
            texts.append(self.convert_tokens_to_string(run))
        return between.join(texts)

    # Files.

    @classmethod
    def _load(cls, directory: Path, settings: dict[str, Any]) -> SentencePieceTokenizer:
        if "added_tokens_decoder" not in settings:
            settings = {**settings, "added_tokens_decoder": read_added_tokens(directory, settings)}
        return super()._load(directory, settings)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary into an existing directory, and returns the paths of the files.

        Args:
            save_directory: where to.
            filename_prefix: put before the names, with a hyphen.

        Raises:
            NotADirectoryError: there is no such directory.
        """
        if not Path(save_directory).is_dir():
            raise NotADirectoryError(f"no such directory to save a vocabulary in: {str(save_directory)!r}")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        files = {f"{prefix}{name}": argument for argument, name in self.vocab_files_names.items()}
        with replace_files(save_directory) as stage:
            for name, argument in files.items():
                (stage / name).write_bytes(self._vocabulary_file(argument))
        return tuple(str(Path(save_directory) / name) for name in files)

    def _vocabulary_file(self, argument: str) -> bytes:
        """The contents of one of `vocab_files_names`."""
        return self._model_proto

    def _save(self, directory: Path) -> list[Path]:
        return [Path(path) for path in self.save_vocabulary(directory)]

    def _saved_settings(self) -> dict[str, Any]:
        return {
            **super()._saved_settings(),
            **added_tokens_settings(self.added_tokens_decoder),
            "sp_model_kwargs": self.sp_model_kwargs,
        }
