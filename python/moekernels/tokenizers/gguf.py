"""The tokenizer in the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moekernels.checkpoint import CheckpointError
from moekernels.tokenizers.bos_eos import GPTNeoXTokenizerFast, LlamaTokenizerFast
from moekernels.tokenizers.fast import PreTrainedTokenizerFast
from moekernels.tokenizers.sentencepiece_base import SPACE

#: Ways of cutting a text into words that are GPT-2's.
_GPT2_WORDS = ("gpt-2", "olmo", "default")
#: Kinds of tokens, as numbers.
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any], **kwargs: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes.

    Args:
        path: the file, for messages.
        metadata: what it says.
        **kwargs: settings, which take precedence.

    Raises:
        CheckpointError: the file has no tokenizer, or one of a kind that is not known.
    """
    entries = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = entries.get("model"), entries.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{path}: tokenizer.ggml.model must be 'gpt2' or 'llama' with its tokens, got {kind!r}")
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    backend = _byte_level(path, entries) if kind == "gpt2" else _pieces(entries)
    kinds = entries.get("token_type") or []
    added = [
        AddedToken(token, special=number == _CONTROL, normalized=False)
        for token, number in zip(tokens, kinds, strict=False)
        if number in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)

    ids = {role: entries.get(f"{name}_token_id") for role, name in _ROLES.items()}
    settings: dict[str, Any] = {role: None if i is None else tokens[i] for role, i in ids.items()}
    for name in ("add_bos_token", "add_eos_token"):
        if name in entries:
            settings[name] = bool(entries[name])
    settings["chat_template"] = metadata.get("tokenizer.chat_template")
    made = GPTNeoXTokenizerFast if kind == "gpt2" else LlamaTokenizerFast
    return made(tokenizer_object=backend, **{**settings, "name_or_path": str(path), **kwargs})


def _byte_level(path: Path, entries: Mapping[str, Any]) -> Tokenizer:
    words = entries.get("pre", "default")
    if words not in _GPT2_WORDS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre must be one of {', '.join(_GPT2_WORDS)}, got {words!r}; use the tokenizer of "
            "the model that the file was made from"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in entries.get("merges") or []]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(entries["tokens"])}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(entries: Mapping[str, Any]) -> Tokenizer:
    tokens, scores = entries["tokens"], entries.get("scores") or []
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = entries.get("unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocabulary, _merges(vocabulary, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if entries.get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece; those of the best piece first, as sentencepiece joins them."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
