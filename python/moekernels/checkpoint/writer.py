"""Writing weights in the safetensors format."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moekernels._files import write_file
from moekernels.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX, SAFETENSORS_SHARD
from moekernels.checkpoint.packed import TensorHeader
from moekernels.checkpoint.reader import DTYPES

#: Weight files of an older save, which a new one replaces even where their names differ.
OBSOLETE_WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, "model-*-of-*.safetensors")

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes from a number or a string such as "5GB" or "200MiB".

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f'size must be a positive number of bytes, or a string such as "5GB", got {size!r}')
    return int(float(match[1]) * _UNITS[match[2]])


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = "5GB",
    *,
    beside: Path | None = None,
    together: Callable[[str], str] = str,
) -> list[str]:
    """Write tensors as safetensors, in shards with an index if they exceed `max_shard_size`.

    A tensor is never split; one larger than `max_shard_size` gets a shard of its own. Tensors of a device, and those
    that are not contiguous, are copied a shard at a time.

    Args:
        directory: where to.
        tensors: names and tensors.
        max_shard_size: bytes, or a string such as "5GB".
        beside: a directory that the files will move to; shards take no names that files there have.
        together: a function of names; tensors in a row for which it gives the same are not put into different shards.

    Returns:
        The names of the files.

    Raises:
        ValueError: `max_shard_size` is no size, a name comes twice, or a dtype has no place in the format.
    """
    writer = WeightsWriter(directory, max_shard_size, beside=beside, together=together)
    for name, tensor in tensors:
        writer.add(name, tensor)
    return writer.finish()


class WeightsWriter:
    """Writes tensors as :func:`write_weights` does, and holds a shard of them until it is full.

    Args:
        directory, max_shard_size, beside, together: see there.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_size: int | str = "5GB",
        *,
        beside: Path | None = None,
        together: Callable[[str], str] = str,
    ) -> None:
        self._directory = directory
        self._limit = parse_size(max_shard_size)
        self._beside = beside
        self._together = together
        #: What each shard that is written holds.
        self._written: list[list[str]] = []
        #: What the next one will.
        self._shard: dict[str, TensorHeader] = {}
        self._tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()
        self._last = ""
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, which must not change until :meth:`finish`.

        Raises:
            ValueError: a tensor of that name is there, or the dtype has no place in the format.
        """
        self._begin(TensorHeader(name, tuple(tensor.shape), tensor.dtype))
        self._tensors[name] = tensor

    def finish(self) -> list[str]:
        """Write what is left, and the index; the names of the files."""
        self._flush(even_if_empty=not self._written)
        if len(self._written) == 1:
            os.rename(self._directory / _unnamed(0), self._directory / SAFETENSORS)
            return [SAFETENSORS]
        files = _shard_names(len(self._written), self._beside)
        for i, file in enumerate(files):
            os.rename(self._directory / _unnamed(i), self._directory / file)
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: file for file, names in zip(files, self._written, strict=True) for name in names},
        }
        write_file(self._directory / SAFETENSORS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        return [*files, SAFETENSORS_INDEX]

    def _begin(self, header: TensorHeader, with_last: bool = False) -> None:
        """Give a tensor its place: in the shard, or `with_last` false and the shard full, in the next."""
        if header.name in self._names:
            raise ValueError(f"write_weights: tensor {header.name!r} is given twice")
        if header.dtype not in DTYPES.values():
            raise ValueError(
                f"write_weights: tensor {header.name!r} has dtype {header.dtype}, which a checkpoint does not hold"
            )
        with_last |= self._together(header.name) == self._together(self._last)
        if not with_last and self._size + header.nbytes > self._limit:
            self._flush()
        self._names.add(header.name)
        self._last = header.name
        self._shard[header.name] = header
        self._size += header.nbytes
        self._total += header.nbytes

    def _flush(self, even_if_empty: bool = False) -> None:
        if self._shard or even_if_empty:
            self._write(self._directory / _unnamed(len(self._written)))
            self._written.append(list(self._shard))
            self._shard, self._size = {}, 0

    def _write(self, path: Path) -> None:
        """The shard to a file."""
        _write_safetensors(path, self._tensors)
        self._tensors = {}


def _unnamed(shard: int) -> str:
    """The name of a shard until it is known how many there are."""
    return f"shard-{shard}.safetensors"


def _shard_names(total: int, beside: Path | None) -> list[str]:
    """Names of shards; with something in between if files of such names are there, as their readers may be."""
    names = [SAFETENSORS_SHARD.format(shard=i + 1, total=total) for i in range(total)]
    if beside is None or not any(os.path.lexists(beside / name) for name in names):
        return names
    tag = uuid.uuid4().hex[:8]
    return [name.replace("model-", f"model-{tag}-", 1) for name in names]


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)  # the library writes files that only their owner can read
