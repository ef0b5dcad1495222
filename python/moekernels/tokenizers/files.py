"""Reading the settings in a tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moekernels.tokenizers.special_tokens import ADDITIONAL, NAMES

CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_MAP_NAME = "special_tokens_map.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
MORE_CHAT_TEMPLATES_NAME = "additional_chat_templates"
ADDED_TOKENS_NAME = "added_tokens.json"
TOKENIZER_NAME = "tokenizer.json"


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
    # The name that transformers 5 gives the list.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings[ADDITIONAL] = settings.pop("extra_special_tokens")
    if settings.get(ADDITIONAL):
        settings[ADDITIONAL] = [as_token(token) for token in settings[ADDITIONAL]]
    templates = _chat_templates(directory)
    if templates:
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else templates
    return settings


def _chat_templates(directory: Path) -> dict[str, str]:
    """The chat templates that are files of their own, by name."""
    paths = {path.stem: path for path in sorted((directory / MORE_CHAT_TEMPLATES_NAME).glob("*.jinja"))}
    if (directory / CHAT_TEMPLATE_NAME).is_file():
        paths = {"default": directory / CHAT_TEMPLATE_NAME, **paths}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def as_token(value: Any) -> Any:
    """A token as files write it: a string, or a dictionary, which becomes an `AddedToken`."""
    if not isinstance(value, dict):
        return value
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=value.get("special", True), **fields)


def read_added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from where they are when `tokenizer_config.json` does not list them.

    The files beside it are `added_tokens.json`, and `tokenizer.json`, whose word counts where both name an id.
    """
    tokens: dict[int, AddedToken] = {}
    if (directory / ADDED_TOKENS_NAME).is_file():
        named = [settings.get(name) for name in NAMES] + list(settings.get(ADDITIONAL) or [])
        special = {str(token) for token in named if token is not None}
        ids = json.loads((directory / ADDED_TOKENS_NAME).read_text(encoding="utf-8"))
        for content, index in ids.items():
            tokens[index] = AddedToken(content, normalized=content not in special, special=content in special)
    if (directory / TOKENIZER_NAME).is_file():
        listed = json.loads((directory / TOKENIZER_NAME).read_text(encoding="utf-8")).get("added_tokens", [])
        tokens.update({token["id"]: as_token(token) for token in listed})
    return tokens


def added_tokens_settings(tokens: dict[int, AddedToken]) -> dict[str, Any]:
    """The entry of `tokenizer_config.json` that lists added tokens."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    listed = {str(index): {name: getattr(token, name) for name in fields} for index, token in sorted(tokens.items())}
    return {"added_tokens_decoder": listed}
