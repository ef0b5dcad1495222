"""The right tokenizer class for a checkpoint directory."""

from __future__ import annotations

import json
import os
from typing import Any

from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.bos_eos import GPTNeoXTokenizerFast, LlamaTokenizerFast
from moekernels.tokenizers.fast import TOKENIZER_NAME, PreTrainedTokenizerFast
from moekernels.tokenizers.files import existing_directory, read_settings

# By the class name in tokenizer_config.json, without "Fast".
_BY_CLASS: dict[str, type[PreTrainedTokenizerBase]] = {
    "GPTNeoXTokenizer": GPTNeoXTokenizerFast,
    "LlamaTokenizer": LlamaTokenizerFast,
    "PreTrainedTokenizer": PreTrainedTokenizerFast,
}
# By the model type in config.json, where there is no class name.
_BY_MODEL_TYPE: dict[str, type[PreTrainedTokenizerBase]] = {
    "olmoe": GPTNeoXTokenizerFast,
    "phimoe": LlamaTokenizerFast,
}


class AutoTokenizer:
    """Not a tokenizer itself: `from_pretrained` returns one."""

    def __init__(self) -> None:
        raise TypeError("use AutoTokenizer.from_pretrained(directory)")

    @staticmethod
    def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
        """Reads the tokenizer of a checkpoint directory; keywords override its settings.

        The class is the one `tokenizer_config.json` names, else the one that belongs to `config.json`'s model type,
        else :class:`PreTrainedTokenizerFast` if there is a `tokenizer.json`.

        Raises:
            FileNotFoundError: there is no such directory, or no tokenizer in it.
        """
        path = existing_directory(directory)
        name = kwargs.pop("tokenizer_class", None) or read_settings(path).get("tokenizer_class") or ""
        found = _BY_CLASS.get(name.removesuffix("Fast"))
        if found is None and not name and (path / "config.json").is_file():
            model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
            found = _BY_MODEL_TYPE.get(model_type)
        if found is None and not (path / TOKENIZER_NAME).is_file():
            named = f"its class {name} is not supported, and " if name else ""
            raise FileNotFoundError(f"no tokenizer in {str(path)!r}: {named}there is no {TOKENIZER_NAME}")
        return (found or PreTrainedTokenizerFast).from_pretrained(path, **kwargs)
