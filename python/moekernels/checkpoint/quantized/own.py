"""Our own layout, of formats that no other library's has: the parts of W are ``W.codes``, ``W.scales``, ..., flat as in
memory, and ``W.shape`` says what they are of. The formats stand in ``config.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.quantized.stored import StoredWeight, need
from moekernels.checkpoint.reader import Reader
from moekernels.quantization import Format, parse_format

METHOD = "moekernels"

SHAPE = ".shape"


def find(reader: Reader, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """The quantised weights of a checkpoint, by name.

    Args:
        reader: the checkpoint.
        config: the entry `quantization_config` of its ``config.json``: `format` and its options, and under `modules`
            those of weights that have others.

    Raises:
        CheckpointError: a weight lacks one of its tensors, or the configuration is not usable.
    """
    shapes = reader.read([name for name in reader.tensors if name.endswith(SHAPE)])
    modules = config.get("modules") or {}
    if not isinstance(modules, Mapping) or not all(isinstance(entry, Mapping) for entry in modules.values()):
        raise CheckpointError(f"{reader.directory}: modules in quantization_config must be an object of objects")
    found = {}
    for name, shape in shapes.items():
        weight = name.removesuffix(SHAPE)
        file = reader.tensors[name].file
        sizes = tuple(int(size) for size in shape.flatten().tolist())
        if len(sizes) not in (2, 3) or min(sizes) < 1:
            raise CheckpointError(f"{file}: {name!r} must be 2 or 3 positive numbers, got {list(sizes)}")
        format = _format(modules.get(weight, config), f"{file}: {weight!r}")
        try:
            format.check_shape(sizes, f"{file}: {weight!r}")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        parts = format.parts(sizes[-1])
        names = {part: need(reader, f"{weight}.{part}", weight) for part in parts}
        found[weight] = StoredWeight(format, sizes, {**names, "shape": name}, _parts_of, names)
    if not found:
        raise CheckpointError(
            f"{reader.directory}: quantization_config says {config.get('format')!r}, but no weight is quantised"
        )
    return found


def _parts_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts are the tensors themselves."""
    return {name: tensor for name, tensor in tensors.items() if name != "shape"}


def _format(entry: Mapping[str, Any], where: str) -> Format:
    options = {name: value for name, value in entry.items() if name not in _NOT_OPTIONS}
    try:
        return parse_format(str(options.pop("format", None)), where, **options)
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error


#: What else stands beside a format's options.
_NOT_OPTIONS = ("quant_method", "modules", "skip_modules", "compute_dtype")


def tensors_of(name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file holds of one weight."""
    for part, tensor in parts.items():
        yield f"{name}.{part}", tensor
    yield name + SHAPE, torch.tensor(list(shape), dtype=torch.int64)
