"""Files that are there whole or not at all: written beside their place, brought to the disk, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of what is at `path` when the block ends.

    Until then, and for good if the block fails or the process dies, what was there stays. A link keeps leading where it
    does, and what is not a file (a terminal, a pipe) is written to directly.

    Raises:
        OSError: it cannot be written; nothing is changed then.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, _mode(target))  # a temporary file is its owner's alone
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    sync(target.parent)


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Puts the content, text as UTF-8, in the place of what was there: :func:`replacing` in one call."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(target: Path) -> int:
    """The permissions of the file that is there, or those of a new one."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
