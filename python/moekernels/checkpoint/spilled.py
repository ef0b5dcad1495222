"""Writing weights that are made one after the other: what there is of a shard lies on disk, not in memory."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moekernels.checkpoint.packed import TensorHeader, bytes_of, header_of
from moekernels.checkpoint.writer import WeightsWriter


class SpilledWriter(WeightsWriter):
    """Writes what :class:`WeightsWriter` does, and holds none of it.

    A file begins with what is in it, which is not known before it is full: until then its tensors go to another file
    without a name, from which the system copies them. That one is open in a `with` statement.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_size: int | str = "5GB",
        *,
        beside: Path | None = None,
        together: Callable[[str], str] = str,
    ) -> None:
        super().__init__(directory, max_shard_size, beside=beside, together=together)
        self._spilled = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        #: Where in it the bytes of each tensor of the shard lie, in order: offsets and sizes.
        self._extents: dict[str, list[tuple[int, int]]] = {}
        #: The bytes that are still to come of tensors that are begun.
        self._missing: dict[str, int] = {}

    def __enter__(self) -> SpilledWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._spilled.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a whole tensor."""
        self.add_slice(name, tensor, tuple(tensor.shape))

    def add_slice(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Add the next rows of a tensor that has `shape` once all are there. Those of others may come in between."""
        if name not in self._missing:
            header = TensorHeader(name, shape, tensor.dtype)
            self._begin(header, with_last=bool(self._missing))
            self._extents[name] = []
            self._missing[name] = header.nbytes
        self._extents[name].append((self._spilled.tell(), tensor.nbytes))
        self._spilled.write(bytes_of(tensor))
        self._missing[name] -= tensor.nbytes
        if self._missing[name] <= 0:
            assert self._missing.pop(name) == 0, name

    def finish(self) -> list[str]:
        assert not self._missing, list(self._missing)
        return super().finish()

    def _write(self, path: Path) -> None:
        # Larger elements first, so that each lies at a multiple of its size.
        headers = sorted(self._shard.values(), key=lambda header: (-header.dtype.itemsize, header.name))
        self._spilled.flush()
        with path.open("wb", buffering=0) as file:
            file.write(header_of(headers))
            for header in headers:
                for begin, size in self._extents.pop(header.name):
                    end = begin + size
                    while begin < end:
                        written = os.sendfile(file.fileno(), self._spilled.fileno(), begin, end - begin)
                        if not written:
                            raise OSError(errno.EIO, "what was written before cannot be read back", str(path))
                        begin += written
        self._spilled.seek(0)
        self._spilled.truncate()
