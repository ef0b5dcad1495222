"""The sentencepiece tokenizer of Llama 2 and PhiMoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken

from moekernels.tokenizers.sentencepiece_base import SPACE
from moekernels.tokenizers.space_prefix import SpacePrefixTokenizer


class LlamaTokenizer(SpacePrefixTokenizer):
    """sentencepiece with byte fallback: what has no piece becomes bytes.

    A text becomes `[bos] X`, a pair `[bos] A [bos] B`, and each part ends with `[eos]` if `add_eos_token` is set.

    Args:
        vocab_file: path of the sentencepiece model.
        unk_token, bos_token, eos_token, pad_token: special tokens.
        sp_model_kwargs: for `sentencepiece.SentencePieceProcessor`, for instance to sample segmentations.
        add_bos_token, add_eos_token: whether texts begin and end with these.
        legacy: put a space before the text after every special token; True if None.
        add_prefix_space: without `legacy`, put a space before the text.
        **kwargs: as for :class:`PreTrainedTokenizerBase`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no sentencepiece model.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}

    def __init__(
        self,
        vocab_file: str | Path,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = True,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        super().__init__(
            spm_file=vocab_file,
            sp_model_kwargs=sp_model_kwargs,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            legacy=legacy,
            add_prefix_space=add_prefix_space is not False,
            **kwargs,
        )

    def _around(self, token_ids: list[int]) -> list[int]:
        bos = [self.convert_tokens_to_ids(self.bos_token)] if self.add_bos_token else []
        eos = [self.convert_tokens_to_ids(self.eos_token)] if self.add_eos_token else []
        return bos + token_ids + eos

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one or two texts with the special tokens around each."""
        return self._around(token_ids_0) + ([] if token_ids_1 is None else self._around(token_ids_1))

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros for a text and ones for its pair, special tokens included."""
        zeros = [0] * len(self._around(token_ids_0))
        return zeros if token_ids_1 is None else zeros + [1] * len(self._around(token_ids_1))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special tokens stay as they are."""
        tokens = list(tokens)
        if tokens and self.add_prefix_space:
            tokens[0] = tokens[0].removeprefix(SPACE)
        special = set(self.all_special_tokens)
        text, after_special = "", False
        run: list[str] = []
        for position, token in enumerate(tokens):
            if token in special:
                text += " " if self.legacy and position and not after_special else ""
                text += self.sp_model.decode(run) + token
                run, after_special = [], True
            else:
                # The space that a text begins with is lost where it begins with a special token.
                text += " " if after_special and position == 1 and self._lost_space(token) else ""
                run.append(token)
                after_special = False
        return text + self.sp_model.decode(run)

    def _lost_space(self, token: str) -> bool:
        return self.add_prefix_space and not token.startswith(SPACE)

    def _saved_settings(self) -> dict[str, Any]:
        return {
            **super()._saved_settings(),
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
        }
