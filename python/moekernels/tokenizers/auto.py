"""The right tokenizer class for a checkpoint directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from moekernels.checkpoint import TOKENIZER_FILES, read_json, resolve, take_hub_options
from moekernels.checkpoint.gguf import GgufReader
from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.bos_eos import GPTNeoXTokenizerFast, LlamaTokenizerFast
from moekernels.tokenizers.fast import PreTrainedTokenizerFast
from moekernels.tokenizers.files import read_settings
from moekernels.tokenizers.gguf import tokenizer_from_gguf
from moekernels.tokenizers.llama import LlamaTokenizer
from moekernels.tokenizers.m2m_100 import M2M100Tokenizer
from moekernels.tokenizers.nllb import NllbTokenizer, NllbTokenizerFast
from moekernels.tokenizers.t5 import T5Tokenizer, T5TokenizerFast


class _Kind(NamedTuple):
    """The classes of one kind of tokenizer: from a `tokenizer.json`, and from a sentencepiece model."""

    fast: type[PreTrainedTokenizerBase] | None
    slow: type[PreTrainedTokenizerBase] | None = None

    def classes(self, use_fast: bool) -> list[type[PreTrainedTokenizerBase]]:
        ordered = (self.fast, self.slow) if use_fast else (self.slow, self.fast)
        return [found for found in ordered if found is not None]


_LLAMA = _Kind(LlamaTokenizerFast, LlamaTokenizer)
_M2M100 = _Kind(None, M2M100Tokenizer)
_NLLB = _Kind(NllbTokenizerFast, NllbTokenizer)
_T5 = _Kind(T5TokenizerFast, T5Tokenizer)
_ANY_FAST = _Kind(PreTrainedTokenizerFast)
# By the class name in tokenizer_config.json, without "Fast".
_BY_CLASS = {
    "GPTNeoXTokenizer": _Kind(GPTNeoXTokenizerFast),
    "LlamaTokenizer": _LLAMA,
    "M2M100Tokenizer": _M2M100,
    "NllbTokenizer": _NLLB,
    "PreTrainedTokenizer": _ANY_FAST,
    "T5Tokenizer": _T5,
}
# By the model type in config.json, where there is no class name.
_BY_MODEL_TYPE = {
    "olmoe": _BY_CLASS["GPTNeoXTokenizer"],
    "phimoe": _LLAMA,
    "m2m_100": _M2M100,
    "nllb-moe": _NLLB,
    "nllb_moe": _NLLB,
    "switch_transformers": _T5,
}


class AutoTokenizer:
    """Not a tokenizer itself: `from_pretrained` returns one."""

    def __init__(self) -> None:
        raise TypeError("use AutoTokenizer.from_pretrained(directory)")

    @staticmethod
    def from_pretrained(
        directory: str | os.PathLike[str], use_fast: bool = True, gguf_file: str | None = None, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        """Reads the tokenizer of a checkpoint; keywords override its settings.

        The kind is the one whose class `tokenizer_config.json` names, else the one that belongs to `config.json`'s
        model type, else one whose files there are.

        Args:
            directory: a checkpoint directory, or the name of a repository on the Hugging Face Hub.
            use_fast: prefer `tokenizer.json` where there is a sentencepiece model too.
            gguf_file: the name of a GGUF file in `directory`, whose metadata describe the tokenizer.
            **kwargs: settings, and those of :func:`moekernels.checkpoint.resolve`, such as `revision`.

        Raises:
            FileNotFoundError: there is no such checkpoint, or no tokenizer in it.
        """
        if gguf_file is not None:
            path = resolve(directory, (gguf_file,), **take_hub_options(kwargs)) / gguf_file
            return tokenizer_from_gguf(path, GgufReader(path).metadata, **kwargs)
        path = resolve(directory, TOKENIZER_FILES, **take_hub_options(kwargs))
        name = kwargs.pop("tokenizer_class", None) or read_settings(path).get("tokenizer_class") or ""
        kind = _BY_CLASS.get(name.removesuffix("Fast"))
        if kind is None and not name:
            kind = _BY_MODEL_TYPE.get(_model_type(path))
        # Several kinds share file names, so those with more files come first.
        any_kind = [_ANY_FAST] if name else [_ANY_FAST, _M2M100, _NLLB, _T5, _LLAMA]
        kinds = any_kind if kind is None else [kind]
        classes = [found for kind in kinds for found in kind.classes(use_fast)]
        for found in classes:
            if all((path / file).is_file() for file in found.vocab_files_names.values()):
                return found.from_pretrained(path, **kwargs)
        said = f"its class {name} is not supported, and " if name and kind is None else ""
        wanted = " or ".join(dict.fromkeys(" with ".join(found.vocab_files_names.values()) for found in classes))
        raise FileNotFoundError(f"no tokenizer in {str(path)!r}: {said}there is no {wanted}")


def _model_type(path: Path) -> str:
    if not (path / "config.json").is_file():
        return ""
    return str(read_json(path / "config.json").get("model_type") or "")
