"""Reading the settings in a tokenizer's files."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from tokenizers import AddedToken

from moekernels.checkpoint import CheckpointError, read_json
from moekernels.tokenizers.special_tokens import ADDITIONAL, NAMES

CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_MAP_NAME = "special_tokens_map.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
MORE_CHAT_TEMPLATES_NAME = "additional_chat_templates"
ADDED_TOKENS_NAME = "added_tokens.json"
TOKENIZER_NAME = "tokenizer.json"


#: What else `tokenizer_config.json` must hold, where it holds it.
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "chat_template": ("a string, or an object or a list of them", (str, dict, list, NoneType)),
    "clean_up_tokenization_spaces": ("true or false", (bool, NoneType)),
    "model_input_names": ("a list of names", (list, NoneType)),
    "model_max_length": ("a number", (int, float, NoneType)),
    "padding_side": ("left or right", (str, NoneType)),
    "sp_model_kwargs": ("an object", (dict, NoneType)),
    "split_special_tokens": ("true or false", (bool, NoneType)),
    "tokenizer_class": ("a string", (str, NoneType)),
    "truncation_side": ("left or right", (str, NoneType)),
}


def read_settings(directory: Path) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, with tokens as `AddedToken`s and the chat template that applies.

    Where the file does not list the added tokens, as older ones do not, `special_tokens_map.json` has the last word on
    special tokens.

    Raises:
        CheckpointError: a file is not what it should be; the message names it, and the entry.
    """
    path = directory / CONFIG_NAME
    settings = read_json(path) if path.is_file() else {}
    for name, (expected, kinds) in _KINDS.items():
        if not isinstance(settings.get(name), kinds):
            raise CheckpointError(f"{path}: {name} must be {expected}, got {settings[name]!r}")
    if "added_tokens_decoder" in settings:
        added = _tokens_by_id(path, settings["added_tokens_decoder"])
        settings["added_tokens_decoder"] = added
        by_content = {str(token): token for token in added.values()}
        for name in NAMES:
            token = _token(path, name, settings.get(name))
            if token is not None:
                settings[name] = by_content.get(str(token), token)
    elif (directory / SPECIAL_TOKENS_MAP_NAME).is_file():
        path = directory / SPECIAL_TOKENS_MAP_NAME
        settings.update({name: value for name, value in read_json(path).items() if name in (*NAMES, ADDITIONAL)})
    for name in NAMES:
        if name in settings:
            settings[name] = _token(path, name, settings[name])
    # The name that transformers 5 gives the list.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings[ADDITIONAL] = settings.pop("extra_special_tokens")
    if settings.get(ADDITIONAL):
        if not isinstance(settings[ADDITIONAL], list):
            raise CheckpointError(f"{path}: {ADDITIONAL} must be a list of tokens, got {settings[ADDITIONAL]!r}")
        settings[ADDITIONAL] = [_token(path, ADDITIONAL, token, optional=False) for token in settings[ADDITIONAL]]
    templates = _chat_templates(directory)
    if templates:
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else templates
    return settings


def _chat_templates(directory: Path) -> dict[str, str]:
    """The chat templates that are files of their own, by name."""
    paths = {path.stem: path for path in sorted((directory / MORE_CHAT_TEMPLATES_NAME).glob("*.jinja"))}
    if (directory / CHAT_TEMPLATE_NAME).is_file():
        paths = {"default": directory / CHAT_TEMPLATE_NAME, **paths}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory}: its chat templates cannot be read: {error}") from error


def _token(path: Path, name: str, value: Any, optional: bool = True) -> Any:
    """A token as files write it: a string, or a dictionary, which becomes an `AddedToken`."""
    if isinstance(value, str | AddedToken) or (optional and value is None):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f'{path}: {name} must be a token, a string or an object with "content", got {value!r}')
    fields = {field: value[field] for field in ("single_word", "lstrip", "rstrip", "normalized") if field in value}
    fields["special"] = value.get("special", True)
    for field, flag in fields.items():
        if not isinstance(flag, bool):
            raise CheckpointError(f"{path}: {name}: {field} must be true or false, got {flag!r}")
    return AddedToken(value["content"], **fields)


def _tokens_by_id(path: Path, listed: Any) -> dict[int, AddedToken]:
    """The entry `added_tokens_decoder`."""
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder must be an object of tokens by id, got {listed!r}")
    tokens = {}
    for index, token in listed.items():
        if not (index.isascii() and index.isdecimal()):
            raise CheckpointError(f"{path}: added_tokens_decoder: {index!r} is no token id")
        if not isinstance(token, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder: token {index} must be an object, got {token!r}")
        tokens[int(index)] = _token(path, f"added_tokens_decoder: token {index}", token)
    return tokens


def read_added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from where they are when `tokenizer_config.json` does not list them.

    The files beside it are `added_tokens.json`, and `tokenizer.json`, whose word counts where both name an id.

    Raises:
        CheckpointError: one of them is not what it should be.
    """
    tokens: dict[int, AddedToken] = {}
    path = directory / ADDED_TOKENS_NAME
    if path.is_file():
        named = [settings.get(name) for name in NAMES] + list(settings.get(ADDITIONAL) or [])
        special = {str(token) for token in named if token is not None}
        for content, index in read_json(path).items():
            tokens[_token_id(path, content, index)] = AddedToken(
                content, normalized=content not in special, special=content in special
            )
    path = directory / TOKENIZER_NAME
    if path.is_file():
        listed = read_json(path).get("added_tokens", [])
        if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
            raise CheckpointError(f"{path}: added_tokens must be a list of objects, got {listed!r}")
        for token in listed:
            index = _token_id(path, token.get("content"), token.get("id"))
            tokens[index] = _token(path, f"added_tokens: token {index}", token)
    return tokens


def _token_id(path: Path, content: Any, index: Any) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise CheckpointError(f"{path}: the id of token {content!r} must be a number from 0 on, got {index!r}")
    return index


def added_tokens_settings(tokens: dict[int, AddedToken]) -> dict[str, Any]:
    """The entry of `tokenizer_config.json` that lists added tokens."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    listed = {str(index): {name: getattr(token, name) for name in fields} for index, token in sorted(tokens.items())}
    return {"added_tokens_decoder": listed}
