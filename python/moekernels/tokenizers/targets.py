"""Encoding target texts without saying so in every call: the older form of `text_target`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# The tokenizers that are in that mode, in this thread alone.
_TARGETS: ContextVar[frozenset[int]] = ContextVar("moekernels_target_tokenizers", default=frozenset())


class TargetMode:
    """Gives a tokenizer `as_target_tokenizer`."""

    @contextmanager
    def as_target_tokenizer(self) -> Iterator[None]:
        """Within this context, the texts of calls are targets. `tokenizer(text_target=...)` does the same."""
        before = _TARGETS.set(_TARGETS.get() | {id(self)})
        try:
            yield
        finally:
            _TARGETS.reset(before)

    def _is_in_target_mode(self) -> bool:
        targets = _TARGETS.get()
        return bool(targets) and id(self) in targets
