"""Where the tensors of a file lie in it, for those who read parts of a file themselves."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

from moekernels.checkpoint.errors import CheckpointError

#: The largest header that the safetensors library reads.
_MAX_HEADER = 100 * 10**6


def tensor_offsets(path: Path) -> dict[str, int]:
    """Name -> the byte of the file at which the tensor's data begin, dense and in the order of its indices.

    Args:
        path: of a :class:`CheckpointReader`, which has checked shapes and sizes. Tensors that do not lie in the file
            like that are left out: transposed ones of a pickle, and all of one written by PyTorch before version 1.6.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _of_safetensors(path: Path) -> dict[str, int]:
    """8 bytes with the length of the header, the header in JSON, the data; offsets in the header count from its end.

    https://huggingface.co/docs/safetensors
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, its header is damaged: {error}") from error


def _of_pickle(path: Path) -> dict[str, int]:
    """A zip archive with a record for each storage, as PyTorch writes it: not compressed."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            return {}
    # On the meta device nothing but the pickle is read, and storages know where theirs begin.
    tensors = torch.load(path, map_location="meta", weights_only=True)
    offsets = {}
    for name, tensor in tensors.items():
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is not None and tensor.is_contiguous():
            offsets[name] = begin + tensor.storage_offset() * tensor.itemsize
    return offsets
