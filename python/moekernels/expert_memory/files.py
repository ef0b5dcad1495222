"""Files that are read past the page cache, which would be a second budget that nobody set."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from moekernels.checkpoint import CheckpointError
from moekernels.expert_memory.layout import ALIGNMENT

#: Reads that bring nothing, though the file is as long as it was, before that is an error.
_MAX_REPEATS = 100


class ExpertReadError(CheckpointError):
    """An expert's weights cannot be read; the message names the expert and the file."""


class ExpertFile:
    """A file of a checkpoint, open for as long as experts are read from it.

    As it stays open, a file that is removed, or replaced by another of its name, is still read as it was. One that is
    changed or cut short where it is cannot be: that is noticed by its size and the time of its last change.

    Args:
        path: the file.

    Attributes:
        is_direct: whether reads go past the page cache (``O_DIRECT``). Where the file system has no such reads, what
            was read is dropped from the cache afterwards, as far as the system follows that advice.

    Raises:
        ExpertReadError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor, self.is_direct = _open(path)
        except OSError as error:
            raise ExpertReadError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self._stamp = self._stat()
        self._advise_drop(0, 0)  # what loading the other weights has read around them

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill the first `needed` bytes of a buffer, and perhaps more of it. A read that ends early is continued.

        Args:
            buffer: begins at a multiple of :data:`ALIGNMENT`, which its length and `offset` are too.
            offset: in the file.
            needed: bytes that the file must have there.

        Raises:
            ExpertReadError: it has not, or the disk fails.
        """
        done = repeats = 0
        while done < needed:
            try:
                got = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except (InterruptedError, BlockingIOError):
                got = 0
            except OSError as error:
                raise ExpertReadError(f"{self.path}: cannot be read: {error.strerror or error}") from error
            if done + got >= needed:
                return
            # The next read begins with a block.
            got -= (done + got) % ALIGNMENT
            done += got
            if got <= 0:
                self.check_unchanged()
                repeats += 1
                if repeats > _MAX_REPEATS:
                    raise ExpertReadError(
                        f"{self.path}: bytes {offset} to {offset + needed} cannot be read: only {done} arrive"
                    )

    def check_unchanged(self) -> None:
        """Raises ExpertReadError if the file is not as it was when it was opened."""
        now = self._stat()
        if now != self._stamp:
            size, was = now[0], self._stamp[0]
            how = f"it had {was} bytes, and has {size}" if size != was else "it was written to"
            raise ExpertReadError(f"{self.path}: changed while the model uses it: {how}; load the model again")

    def drop(self, offset: int, nbytes: int) -> None:
        """Take bytes that were read out of the page cache, if reads go through it."""
        if not self.is_direct:
            self._advise_drop(offset, nbytes)

    def _advise_drop(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _stat(self) -> tuple[int, int]:
        try:
            found = os.fstat(self._descriptor)
        except OSError as error:  # a file of another machine that is gone there
            raise ExpertReadError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return found.st_size, found.st_mtime_ns


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        descriptor = -1
        try:
            descriptor = os.open(path, flags | os.O_DIRECT)
            os.preadv(descriptor, [mmap.mmap(-1, ALIGNMENT)], 0)
            return descriptor, True
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    descriptor = os.open(path, flags)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is to be read ahead
    return descriptor, False
