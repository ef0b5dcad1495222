"""Reading the settings in a tokenizer's files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moekernels.tokenizers.special_tokens import ADDITIONAL, NAMES

CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_MAP_NAME = "special_tokens_map.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"


def existing_directory(directory: str | os.PathLike[str]) -> Path:
    """`directory` as a path. Raises FileNotFoundError if there is none."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"no such checkpoint directory: {os.fspath(directory)!r} (models are read from disk; download them first)"
        )
    return Path(directory)


def read_settings(directory: Path) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, with tokens as `AddedToken`s and the chat template that applies.

    Where the file does not list the added tokens, as older ones do not, `special_tokens_map.json` has the last word on
    special tokens.
    """
    path = directory / CONFIG_NAME
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        added = {int(index): as_token(token) for index, token in settings["added_tokens_decoder"].items()}
        settings["added_tokens_decoder"] = added
        by_content = {str(token): token for token in added.values()}
        for name in NAMES:
            token = as_token(settings.get(name))
            if token is not None:
                settings[name] = by_content.get(str(token), token)
    elif (directory / SPECIAL_TOKENS_MAP_NAME).is_file():
        overrides = json.loads((directory / SPECIAL_TOKENS_MAP_NAME).read_text(encoding="utf-8"))
        settings.update({name: value for name, value in overrides.items() if name in (*NAMES, ADDITIONAL)})
    for name in NAMES:
        if name in settings:
            settings[name] = as_token(settings[name])
    if settings.get(ADDITIONAL):
        settings[ADDITIONAL] = [as_token(token) for token in settings[ADDITIONAL]]
    if (directory / CHAT_TEMPLATE_NAME).is_file():
        settings["chat_template"] = (directory / CHAT_TEMPLATE_NAME).read_text(encoding="utf-8")
    return settings


def as_token(value: Any) -> Any:
    """A token as files write it: a string, or a dictionary, which becomes an `AddedToken`."""
    if not isinstance(value, dict):
        return value
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=value.get("special", True), **fields)
