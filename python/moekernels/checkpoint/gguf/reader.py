"""Reading a GGUF file, by way of the optional package gguf."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.gguf.names import GGUF_KEY_MAPS
from moekernels.checkpoint.reader import TensorInfo
from moekernels.quantization import QuantizedWeight, parse_format

#: Types of tensors that are plain numbers, by the names that GGUF has for them.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Types of packed blocks -> our name for them, and for the same bits as kernels read them, codes and scales apart.
_PACKED = {
    "Q4_0": ("q4_0", "int4"),
    "Q8_0": ("q8_0", "int8_groups"),
    "Q4_K": ("q4_k", "q4_k"),
    "Q6_K": ("q6_k", "q6_k"),
}


class GgufReader:
    """The weights and the metadata of a GGUF file, with the interface of :class:`CheckpointReader`.

    The file is mapped into memory, so that opening it reads only its header.

    Args:
        path: the file.

    Attributes:
        metadata: key -> string, number, or list of them.
        architecture: the model type.
        key_map: the names of that architecture in GGUF files.
        tensors: name -> :class:`TensorInfo` of everything in the file.

    Raises:
        CheckpointError: the file is damaged, one of several parts, or holds tensors of a type that is not supported.
        ImportError: the gguf package is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = Path(path)
        self._reader = _open(self.directory)
        self.metadata: dict[str, Any] = {
            name: field.contents() for name, field in self._reader.fields.items() if not name.startswith("GGUF.")
        }
        found = self.metadata.get("general.architecture")
        if found not in GGUF_KEY_MAPS:
            known = " or ".join(map(repr, GGUF_KEY_MAPS))
            raise CheckpointError(f"{path}: general.architecture must be {known}, got {found!r}")
        self.architecture: str = found
        self.key_map = GGUF_KEY_MAPS[found]
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{path}: is one of {parts} parts; join them first, with llama.cpp's gguf-split --merge"
            )
        self.tensors = {tensor.name: self._info(tensor) for tensor in self._reader.tensors}

    def _info(self, tensor: Any) -> TensorInfo:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        name = tensor.tensor_type.name
        if name in _PLAIN:
            return TensorInfo(self.directory, shape, _PLAIN[name])
        if name in _PACKED:
            return TensorInfo(self.directory, shape, None, parse_format(_PACKED[name][1]), int(tensor.n_bytes))
        known = ", ".join((*_PLAIN, *_PACKED))
        raise CheckpointError(f"{self.directory}: {tensor.name!r} has the type {name}, expected one of {known}")

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors by name; mapped, or codes and scales apart."""
        return {tensor.name: self._mapped(tensor) for tensor in self._reader.tensors if tensor.name in names}

    def _mapped(self, tensor: Any) -> Tensor:
        data = torch.from_numpy(tensor.data)
        info = self.tensors[tensor.name]
        if info.format is None:
            return data if info.dtype != torch.bfloat16 else data.view(torch.bfloat16)
        lead = info.shape[:-2]
        blocks = _PACKED[tensor.tensor_type.name][0]
        return QuantizedWeight({"blocks": data.view(*lead, -1)}, blocks, info.shape).apart()

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """All tensors, or those wanted, as one shard; the memory of each is given back once the next is asked for."""
        yield self._released(wanted)

    def _released(self, wanted: Container[str] | None) -> Iterator[tuple[str, Tensor]]:
        mapped = self._reader.data._mmap
        for tensor in self._reader.tensors:
            if wanted is not None and tensor.name not in wanted:
                continue
            yield tensor.name, self._mapped(tensor)
            begin = -(-int(tensor.data_offset) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (int(tensor.data_offset) + int(tensor.n_bytes)) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are read by the gguf package: pip install 'moekernels[gguf]'") from error
    try:
        # Private to this process: tensors of a file that is mapped read-only cannot be torch's.
        return gguf.GGUFReader(path, "c")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a reader of a broken file ends with
        raise CheckpointError(f"{path}: not a readable GGUF file, it may be truncated: {error}") from error
