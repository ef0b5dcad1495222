"""Reading a checkpoint directory: what it holds, without reading the data; then the data, shard by shard."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.files import (
    PICKLE,
    PICKLE_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    checked_shard,
    read_json,
    with_variant,
)
from moekernels.checkpoint.mapping import released
from moekernels.quantization import Format, QuantizedWeight

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        file: that holds it.
        shape: of the weight, also where that is quantised.
        dtype: None for one that PyTorch models do not hold (such as float8), and for a quantised weight.
        format: of a quantised weight.
        stored: the bytes in the file of a quantised weight.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    format: Format | None = None
    stored: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        if self.format is not None:
            return self.stored
        size = 1 if self.dtype is None else self.dtype.itemsize
        return size * torch.Size(self.shape).numel()

    @property
    def is_weight(self) -> bool:
        """Whether a parameter can be made of it."""
        return self.format is not None or (self.dtype is not None and self.dtype.is_floating_point)


class Reader(Protocol):
    """What holds the weights of a checkpoint.

    Attributes:
        directory: where they are, for messages.
        tensors: name -> :class:`TensorInfo` of all of them.
    """

    directory: Path
    tensors: dict[str, TensorInfo]

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Each shard as an iterator over names and tensors, all or those wanted, valid until the next is asked for."""
        ...

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors, by name."""
        ...


#: An open shard: names and infos of its tensors, and a function that maps one into memory.
_Shard = tuple[dict[str, TensorInfo], Callable[[str], Tensor]]


class CheckpointReader:
    """The weights of a checkpoint directory.

    Looks for ``model.safetensors``, its sharded form, ``pytorch_model.bin`` and its sharded form, in this order.
    Files are mapped into memory, so that opening a checkpoint reads only its headers.

    Args:
        directory: the checkpoint.
        use_safetensors: True or False look for one of the formats only.
        variant: an infix in the names of the files ("fp16": ``model.fp16.safetensors``).

    Attributes:
        tensors: name -> :class:`TensorInfo` of everything in the checkpoint.

    Raises:
        CheckpointError: there are no weights, an index is broken or names a file outside the directory, a shard is
            missing or truncated, two shards hold the same tensor, or a pickle holds anything but tensors.
    """

    def __init__(
        self, directory: str | os.PathLike[str], use_safetensors: bool | None = None, variant: str | None = None
    ) -> None:
        self.directory = Path(directory)
        self.files, weight_map, index = self._find(use_safetensors, variant)
        self.tensors: dict[str, TensorInfo] = {}
        for path in self.files:
            with open_shard(path) as (infos, _):
                for name, info in infos.items():
                    if name in self.tensors:
                        raise CheckpointError(f"{path}: holds {name!r}, as does {self.tensors[name].file.name}")
                    self.tensors[name] = info
        for name, file in weight_map.items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file:
                where = "nowhere" if found is None else f"in {found.file.name}"
                raise CheckpointError(f"{index}: {name!r} should be in {file}, but is {where}")

    def _find(self, use_safetensors: bool | None, variant: str | None) -> tuple[list[Path], Mapping[str, str], Path]:
        """The files with weights, and the index that lists what they hold."""
        candidates = []
        if use_safetensors is not False:
            candidates += [(SAFETENSORS, SAFETENSORS_INDEX)]
        if use_safetensors is not True:
            candidates += [(PICKLE, PICKLE_INDEX)]
        candidates = [(with_variant(single, variant), with_variant(index, variant)) for single, index in candidates]
        for single, sharded in candidates:
            if (self.directory / single).exists():
                return [self.directory / single], {}, self.directory / single
            index = self.directory / sharded
            if index.exists():
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise CheckpointError(
                        f"{index}: weight_map must be a JSON object that names files, got {weight_map!r}"
                    )
                paths = [checked_shard(self.directory, name, index) for name in weight_map.values()]
                return list(dict.fromkeys(paths)), weight_map, index
        wanted = ", ".join(name for pair in candidates for name in pair)
        raise CheckpointError(f"{self.directory}: holds no weights, expected one of {wanted}")

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Each shard as an iterator over its names and tensors, which are valid until the next shard is asked for.

        Once a tensor has been used, and the next one is asked for, the memory that mapped it is given back.

        Args:
            wanted: the tensors to read; all by default.
        """
        files: Collection[Path] = self.files
        if wanted is not None:  # opening one takes milliseconds
            files = dict.fromkeys(info.file for name, info in self.tensors.items() if name in wanted)
        for path in files:
            with open_shard(path) as (infos, get):
                yield released(((name, get(name)) for name in infos if wanted is None or name in wanted), path)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of some of the tensors, by name."""
        found = {}
        for path in dict.fromkeys(self.tensors[name].file for name in names):
            with open_shard(path) as (_, get):
                found.update({name: get(name).clone() for name in names if self.tensors[name].file == path})
        return found


class StateDictReader:
    """Weights in memory, with the interface of :class:`CheckpointReader`.

    Args:
        state_dict: name -> tensor; names and shapes as in a file.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.directory = Path("state_dict")
        self._tensors = state_dict
        self.tensors = {
            name: TensorInfo(self.directory, tuple(tensor.shape), None, tensor.format, tensor.num_bytes)
            if isinstance(tensor, QuantizedWeight)
            else TensorInfo(self.directory, tuple(tensor.shape), tensor.dtype)
            for name, tensor in state_dict.items()
        }

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """All of them, or those that are wanted, as one shard."""
        yield ((name, tensor) for name, tensor in self._tensors.items() if wanted is None or name in wanted)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors, by name."""
        return {name: self._tensors[name] for name in names}


@contextmanager
def open_shard(path: Path) -> Iterator[_Shard]:
    """A file's tensors, which are valid until it is closed.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        try:
            path.open("rb").close()  # whose error says why; the library's calls whatever it may not read missing
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file, it may be truncated: {error}") from error
        with file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            infos = {
                name: TensorInfo(path, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
                for name, part in slices.items()
            }
            yield infos, file.get_tensor
    else:
        tensors = _load_pickle(path)
        yield {name: TensorInfo(path, tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """A ``.bin`` file by PyTorch's restricted unpickler, which runs no code from the file."""
    arguments: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            tensors = torch.load(path, mmap=True, **arguments)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Written before PyTorch 1.6, in a format that cannot be mapped.
            tensors = torch.load(path, **arguments)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: a pickle that holds more than tensors; it is not loaded, as that could run its code. "
            f"Expected a state dict, or a safetensors file ({str(error).partition(chr(10))[0]})"
        ) from error
    except Exception as error:  # whatever a machine that reads a broken program ends with
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable PyTorch file, it may be truncated: {reason}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: must hold a dictionary of tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: must hold only tensors, got {type(tensor).__name__} under {name!r}")
    return tensors
