"""The arguments of a call of a tokenizer, checked and resolved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

DO_NOT_PAD, LONGEST, MAX_LENGTH = "do_not_pad", "longest", "max_length"
DO_NOT_TRUNCATE, LONGEST_FIRST = "do_not_truncate", "longest_first"

_PADDING: dict[bool | str, str] = {
    True: LONGEST,
    False: DO_NOT_PAD,
    **{name: name for name in (DO_NOT_PAD, LONGEST, MAX_LENGTH)},
}
_TRUNCATION: dict[bool | str | None, str] = {
    True: LONGEST_FIRST,
    False: DO_NOT_TRUNCATE,
    None: DO_NOT_TRUNCATE,
    **{name: name for name in (DO_NOT_TRUNCATE, LONGEST_FIRST, "only_first", "only_second")},
}


@dataclass
class EncodeOptions:
    """The checked arguments of one call."""

    add_special_tokens: bool = True
    padding: str = "do_not_pad"  # or "longest", "max_length"
    truncation: str = "do_not_truncate"  # or "longest_first", "only_first", "only_second"
    max_length: int | None = None
    stride: int = 0
    pretokenized: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"
    split_special_tokens: bool = False
    token_type_ids: bool = False
    attention_mask: bool = True
    overflowing_tokens: bool = False
    special_tokens_mask: bool = False
    offsets_mapping: bool = False
    length: bool = False
    verbose: bool = True
    around: tuple[list[int], list[int]] | None = None  # the ids before and after a text of the call's language


def resolve_lengths(
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    *,
    model_max_length: int | None,
    pad_to_multiple_of: int | None = None,
) -> tuple[str, str, int | None]:
    """How to pad, how to truncate, and the length for both, from what a caller passed.

    A `max_length` alone means truncation. Without one the model's limit serves; without that either, nothing is padded
    or truncated to it.

    Raises:
        ValueError: an unknown strategy, or a `max_length` that padding to a multiple would pass.
    """
    if padding not in _PADDING:
        raise ValueError(f"padding must be a boolean, 'longest' or 'max_length', got {padding!r}")
    if truncation not in _TRUNCATION:
        raise ValueError(
            f"truncation must be a boolean, 'longest_first', 'only_first' or 'only_second', got {truncation!r}"
        )
    if max_length is not None and padding is False and truncation is None:
        truncation = True
    pad, cut = _PADDING[padding], _TRUNCATION[truncation]
    if max_length is None and (pad == MAX_LENGTH or cut != DO_NOT_TRUNCATE):
        max_length = model_max_length
        if max_length is None:
            pad, cut = (DO_NOT_PAD if pad == MAX_LENGTH else pad), DO_NOT_TRUNCATE
    both = pad != DO_NOT_PAD and cut != DO_NOT_TRUNCATE
    if both and pad_to_multiple_of and max_length is not None and max_length % pad_to_multiple_of:
        raise ValueError(f"max_length={max_length} is not a multiple of pad_to_multiple_of={pad_to_multiple_of}")
    return pad, cut, max_length


def check_side(name: str, side: str) -> str:
    """Returns `side`. Raises ValueError if it is neither left nor right."""
    if side not in ("left", "right"):
        raise ValueError(f"{name} must be 'left' or 'right', got {side!r}")
    return side


def check_texts(name: str, texts: Any) -> None:
    """Raises TypeError unless `texts` is a text, a batch, or a batch of lists of words, judged by its first entries."""
    first = texts
    for _ in range(2):
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
    if not isinstance(first, (str, list, tuple)) or (isinstance(first, (list, tuple)) and first):
        raise TypeError(
            f"{name} must be a string or a list of strings, got {type(first).__name__} in {type(texts).__name__}"
        )


def unreadable(texts: Any) -> ValueError | TypeError | None:
    """The error for what no tokenizer can read, no text or half a surrogate pair in one; None if there is none."""
    if isinstance(texts, (list, tuple)):
        return next((error for text in texts if (error := unreadable(text)) is not None), None)
    if not isinstance(texts, str):
        return TypeError(f"every text must be a string, got {type(texts).__name__}: {texts!r:.40}")
    found = re.search("[\ud800-\udfff]", texts)
    if found is None:
        return None
    return ValueError(
        f"a text has a lone surrogate, {found[0]!a}, at {found.start()}, which is no character: what it was read from "
        "is not UTF-8"
    )
