"""A checkpoint whose quantised weights are put together, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.quantized import bitsandbytes, own
from moekernels.checkpoint.quantized.stored import StoredWeight
from moekernels.checkpoint.reader import Reader, TensorInfo
from moekernels.quantization import QuantizedWeight

_LAYOUTS: dict[str, Callable[[Reader, Mapping[str, Any]], dict[str, StoredWeight]]] = {
    bitsandbytes.METHOD: bitsandbytes.find,
    own.METHOD: own.find,
}


def check_method(config: Any, where: str) -> None:
    """Refuse a `quantization_config` of ``config.json`` that belongs to no layout which is read.

    Raises:
        CheckpointError: naming the method.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: quantization_config must be a JSON object, got {type(config).__name__}")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        return  # older files of bitsandbytes name no method
    if method not in _LAYOUTS:
        raise CheckpointError(
            f"{where}: its weights are quantised by {method or 'a method without a name'}, which is not supported "
            f"(quant_method must be one of {', '.join(_LAYOUTS)}); load the checkpoint they were made from"
        )


def check_whole(reader: Reader) -> None:
    """Refuse the files of quantised weights where ``config.json`` says of none.

    Raises:
        CheckpointError: naming a tensor.
    """
    for name, info in reader.tensors.items():
        if name.endswith((".SCB", ".absmax", ".qweight", ".weight_scale", ".weight_scale_inv", ".weight_packed")):
            raise CheckpointError(
                f"{info.file}: holds quantised weights ({name!r}), but the configuration has no quantization_config "
                "that says how to read them"
            )


class QuantizedReader:
    """A reader whose quantised weights are single tensors, each a :class:`QuantizedWeight`.

    Args:
        reader: of the files.
        config: the entry `quantization_config` of ``config.json``.

    Attributes:
        tensors: name -> :class:`TensorInfo`, those of quantised weights with their format and logical shape.

    Raises:
        CheckpointError: the method is not supported, or tensors and configuration contradict each other.
    """

    def __init__(self, reader: Reader, config: Mapping[str, Any]) -> None:
        self.directory = reader.directory
        self._reader = reader
        check_method(config, str(reader.directory))
        find = _LAYOUTS[config.get("quant_method") or bitsandbytes.METHOD]
        self._weights = find(reader, config)
        self._part_of = {
            name: (weight, part) for weight, stored in self._weights.items() for part, name in stored.names.items()
        }
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in reader.tensors.items():
            owner = self._part_of.get(name)
            if owner is None:
                self.tensors[name] = info
            elif owner[0] not in self.tensors:
                self.tensors[owner[0]] = self._info(owner[0])

    def _info(self, weight: str) -> TensorInfo:
        stored = self._weights[weight]
        infos = [self._reader.tensors[name] for name in stored.names.values()]
        return TensorInfo(infos[0].file, stored.shape, None, stored.format, sum(info.nbytes for info in infos))

    @property
    def reader(self) -> Reader:
        """That of the files."""
        return self._reader

    def parts_in_files(self, weight: str) -> Mapping[str, str | float] | None:
        """See :attr:`StoredWeight.in_files`.

        Raises:
            CheckpointError: the tensors are not those of a weight of that format and shape.
        """
        stored = self._weights[weight]
        if stored.in_files is None:
            return None
        infos = {part: self._reader.tensors[name] for part, name in stored.names.items()}
        empty = {part: torch.empty(info.shape, dtype=info.dtype, device="meta") for part, info in infos.items()}
        stored.checked_parts(empty, f"{self.tensors[weight].file}: {weight!r}")
        return stored.in_files

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors, by name."""
        files = {name for each in names for name in self._names(each)}
        tensors = iter(self._reader.read(files).items())
        return dict(self._joined(tensors, {}))

    def _names(self, name: str) -> Iterable[str]:
        return self._weights[name].names.values() if name in self._weights else (name,)

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """As those of the reader. A weight whose parts lie in several shards comes with the last of them."""
        waiting: dict[str, dict[str, Tensor]] = {}
        names = (
            None if wanted is None else {part for name in self.tensors if name in wanted for part in self._names(name)}
        )
        for shard in self._reader.shards(names):
            yield self._joined(shard, waiting)

    def _joined(
        self, shard: Iterator[tuple[str, Tensor]], waiting: dict[str, dict[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shard:
            if name not in self._part_of:
                yield name, tensor
                continue
            weight, part = self._part_of[name]
            tensors = waiting.setdefault(weight, {})
            stored = self._weights[weight]
            if len(tensors) + 1 < len(stored.names):
                tensors[part] = tensor.clone()  # before the reader gives back the memory that maps it
                continue
            tensors[part] = tensor
            del waiting[weight]
            where = f"{self.tensors[weight].file}: {weight!r}"
            parts = stored.checked_parts(tensors, where)
            del tensors
            yield weight, QuantizedWeight(parts, stored.format, stored.shape)
