"""Text files."""

from __future__ import annotations

from pathlib import Path


def read_lines(name: str) -> list[str]:
    """The lines of a file. Raises ValueError if it is not UTF-8."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is not UTF-8: {error}") from error
    # Not splitlines, which also breaks at characters that may stand within a line.
    return text.removesuffix("\n").split("\n") if text else []
