"""A `tokenizers.Tokenizer` that several threads use at once."""

from __future__ import annotations

import threading
from typing import Any

from tokenizers import Tokenizer


class Backends:
    """Lends a tokenizer to one thread at a time, and copies of it to others meanwhile.

    How to truncate and pad, and what stands around a text, are settings of a `tokenizers.Tokenizer` and not arguments
    of its calls, which let other threads run. A thread that has borrowed one may set it as it likes. Copies share the
    vocabulary, and are made when threads meet; one thread alone always gets the tokenizer itself.

    Attributes:
        main: the tokenizer.
        main_is_lent: held while a thread has it.
    """

    def __init__(self, main: Tokenizer) -> None:
        self.main = main
        self.main_is_lent = threading.Lock()
        # A new list takes the place of this one when copies no longer are what the tokenizer is.
        self._spare: list[Tokenizer] = []

    def take(self) -> tuple[Tokenizer, list[Tokenizer] | None]:
        """A tokenizer that no other thread uses until :meth:`give` gets what this returned."""
        if self.main_is_lent.acquire(blocking=False):
            return self.main, None
        spare = self._spare
        try:
            return spare.pop(), spare
        except IndexError:
            return _copy(self.main), spare

    def give(self, lent: tuple[Tokenizer, list[Tokenizer] | None]) -> None:
        """Takes back what :meth:`take` returned."""
        tokenizer, home = lent
        if home is None:
            self.main_is_lent.release()
        else:
            home.append(tokenizer)

    def changing(self) -> _Changing:
        """A context in which the tokenizer may be changed for good: it waits until no thread uses it."""
        return _Changing(self)

    def forget_copies(self) -> None:
        """Copies are made anew: the tokenizer has changed, or may."""
        self._spare = []

    def __getstate__(self) -> dict[str, Any]:
        return {"main": self.main}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Backends.__init__(self, state["main"])


class _Changing:
    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    def __enter__(self) -> Tokenizer:
        self._backends.main_is_lent.acquire()
        return self._backends.main

    def __exit__(self, *exception: object) -> None:
        self._backends.forget_copies()
        self._backends.main_is_lent.release()


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with settings of its own, which shares the parts that do the work."""
    copy = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        value = getattr(tokenizer, part)
        if value is not None:
            setattr(copy, part, value)
    # In the order of ids, which are given out in that of adding.
    copy.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    return copy
