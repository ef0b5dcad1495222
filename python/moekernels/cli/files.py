"""Text files."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from moekernels._files import replacing


class Lines:
    """The lines of a UTF-8 text, one after the other. One that is not UTF-8 is reported on stderr by its number.

    Args:
        name: the file, which is read at once; stdin if None or "-", line by line.
        errors: what becomes of a line that is not UTF-8: "skip" makes it blank, "replace" puts U+FFFD in place of what
            is wrong, "stop" raises ValueError.

    Attributes:
        broken: lines that were not UTF-8, so far.
        total: how many lines there are; None where that is not known.
    """

    def __init__(self, name: str | None, errors: str = "skip") -> None:
        self.errors = errors
        self.broken = 0
        self.total: int | None = None
        self._source: Iterable[bytes | str]
        if name in (None, "-"):
            self._name = "stdin"
            # The bytes: Python decodes stdin as the locale says, and may hide what is wrong with it.
            self._source = getattr(sys.stdin, "buffer", sys.stdin)
        else:
            assert name is not None
            self._name = name
            data = Path(name).read_bytes()
            # Not splitlines, which also breaks at characters that may stand within a line.
            self._source = data.removesuffix(b"\n").split(b"\n") if data else []
            self.total = len(self._source)

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._source, start=1):
            data = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                yield self._instead(number, data, error)

    def _instead(self, number: int, data: bytes, error: UnicodeDecodeError) -> str:
        wrong = f"{self._name}, line {number}: not UTF-8: byte 0x{data[error.start]:02x} at {error.start + 1}"
        if self.errors == "stop":
            raise ValueError(wrong) from error
        self.broken += 1
        print(f"moekernels: {wrong}; {'left blank' if self.errors == 'skip' else 'replaced'}", file=sys.stderr)
        return "" if self.errors == "skip" else data.decode("utf-8", "replace")


def add_errors_argument(group: Any) -> None:
    """The option that says what becomes of lines that are not UTF-8."""
    group.add_argument(
        "--errors",
        choices=("skip", "replace", "stop"),
        default="skip",
        help="a line that is not UTF-8 is reported and left blank (skip, the default), or read with U+FFFD in place of "
        "what is wrong (replace), and the exit code is 1; or it ends everything (stop)",
    )


def read_stdin() -> str:
    """All of stdin. Raises ValueError if it is not UTF-8."""
    return "".join(Lines(None, "stop")).replace("\r\n", "\n")


@contextmanager
def output_file(name: str) -> Iterator[TextIO]:
    """A file of UTF-8 text that takes the place of what is there when the block ends, and only if it ends well."""
    with replacing(name) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()
