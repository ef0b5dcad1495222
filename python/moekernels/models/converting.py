"""Quantising a checkpoint file by file, without ever holding the model."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moekernels.checkpoint import (
    OBSOLETE_WEIGHTS,
    TOKENIZER_FILES,
    CheckpointError,
    HubOptions,
    LoadReport,
    Reader,
    TensorInfo,
    check_sizes,
    load_checkpoint,
    parse_size,
    replace_files,
    resolve,
    resolve_weights,
)
from moekernels.checkpoint.hub import GENERATION_CONFIG_FILES
from moekernels.checkpoint.quantized import experts_slice, quantized_tensors, weight_of
from moekernels.checkpoint.spilled import SpilledWriter
from moekernels.models.auto import AutoConfig, model_class
from moekernels.models.configuration import CONFIG_NAME
from moekernels.models.loading import open_weights, stored_dtype
from moekernels.models.quantization import AnyConfig
from moekernels.models.quantized import describe_quantization, packing_of, stored_size

_MARGIN = 64 * 2**20  # what a disk must have free beside the weights
_SLICE = 64 * 2**20  # bytes of a checkpoint's experts that are quantised before they are written


class _Part:
    """A reader that has some of another one's tensors."""

    def __init__(self, reader: Reader, names: Collection[str]) -> None:
        self.directory = reader.directory
        self.tensors: dict[str, TensorInfo] = {name: reader.tensors[name] for name in names}
        self._reader = reader

    def shards(self, wanted: Container[str] | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        names = {name for name in self.tensors if wanted is None or name in wanted}
        yield from self._reader.shards(names)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return self._reader.read(names)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    quantization_config: AnyConfig,
    *,
    max_shard_size: int | str = "2GB",
    progress: bool | None = None,
    **hub: Any,
) -> int:
    """Write a checkpoint whose weights are quantised, with the other files that belong to it.

    Weights are read, quantised and written one parameter after the other, stacks of experts by slices: no more is in
    memory than the largest parameter that is no stack, or a few experts. Beside the result the disk holds a shard more
    meanwhile. The files take their places together once they are there.

    Args:
        source: a checkpoint directory, or its name on the Hugging Face Hub.
        target: the directory to write.
        quantization_config: what to do with the weights.
        max_shard_size: of the files, in bytes or as a string.
        progress: show a progress bar; None does so on a terminal.
        **hub: see :func:`moekernels.checkpoint.resolve`.

    Returns:
        The bytes of the weights.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be used, or is quantised already.
        ValueError: nothing would be quantised, or `source` and `target` are the same.
        OSError: the disk has no room for the result; nothing is written then.
    """
    options: HubOptions = hub  # type: ignore[assignment]
    quantization = quantization_config.quantization()
    if quantization is None:
        raise ValueError("quantize_checkpoint: the configuration leaves all weights whole")
    config = AutoConfig.from_pretrained(source, **hub)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{source}: its weights are quantised already")
    local = resolve_weights(source, **options)
    if Path(target).exists() and local.samefile(target):
        raise ValueError(f"quantize_checkpoint: {target} is the checkpoint itself; write to another directory")
    reader = open_weights(local, None, None, None, None)
    cls = model_class(config)
    model: Any = cls._build(config, None, "meta")
    check_sizes(config, reader, model.key_map)
    model._fit({model.key_map.canonical(name) for name in reader.tensors})
    dtype = config.dtype or stored_dtype(reader)
    packing = packing_of(model, model.key_map, quantization)

    def load(
        module: nn.Module,
        part: Reader,
        left_out: Callable[[str], bool] = lambda name: False,
        held: dict[str, range] | None = None,
    ) -> LoadReport:
        return load_checkpoint(
            module, part, model.key_map, dtype=dtype, device="cpu", keep_float32=model._keeps_float32,
            left_out=left_out, packing=packing, held=held, progress=False,
        )  # fmt: skip

    # With all of it left out, this looks at everything and loads nothing.
    sources = load(model, reader, lambda name: True).left_out
    formats = {name: format for name in sources if (format := packing.format(name)) is not None}
    if not formats:
        raise ValueError(f"quantize_checkpoint: {source} has no weight that would be quantised")
    needed = sum(
        stored_size(model.get_parameter(name), formats.get(name), _dtype(model, name, dtype)) for name in sources
    )
    largest = max(
        stored_size(model.get_parameter(name), formats.get(name), _dtype(model, name, dtype)) for name in sources
    )
    _check_room(Path(target), needed, min(needed, max(parse_size(max_shard_size), largest)))
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = quantization_config.to_dict()
    storage = describe_quantization(model, formats)

    def convert(writer: SpilledWriter, name: str, part: Reader, experts: range | None) -> None:
        """A parameter, or some experts of a stack. Nothing of it stays in memory."""
        parameter = model.get_parameter(name)
        holder = _holder(name, parameter)
        load(holder, part, held=None if experts is None else {name: experts})
        weight = holder.get_parameter(name).detach()
        if experts is None:
            for key, tensor in quantized_tensors({name: weight}, model.key_map, storage, dtype):
                writer.add(key, tensor)
            return
        num_experts = parameter.shape[0]
        for key, tensor, whole in experts_slice(name, weight, experts, num_experts, model.key_map, storage, dtype):
            writer.add_slice(key, tensor, whole)

    total = sum(reader.tensors[name].nbytes for names in sources.values() for name in names.values())
    is_hidden = not (sys.stderr.isatty() if progress is None else progress)
    with (
        replace_files(target, OBSOLETE_WEIGHTS) as stage,
        SpilledWriter(stage, max_shard_size, beside=Path(target), together=weight_of) as writer,
        tqdm(total=total, desc="Quantising weights", unit="B", unit_scale=True, disable=is_hidden) as bar,
    ):
        for name, names in sources.items():
            part = _Part(reader, list(names.values()))
            nbytes = sum(info.nbytes for info in part.tensors.values())
            shape = model.get_parameter(name).shape
            if len(shape) < 3:
                convert(writer, name, part, None)
                bar.update(nbytes)
                continue
            for experts in _slices(shape[0], nbytes):
                convert(writer, name, part, experts)
                bar.update(nbytes * len(experts) / shape[0])
        writer.finish()
        _copy_others(resolve(source, (*GENERATION_CONFIG_FILES, *TOKENIZER_FILES), **options), stage)
        model.config.to_json_file(stage / CONFIG_NAME)
    return needed


def _dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if model._keeps_float32(name) else dtype


def _holder(name: str, parameter: nn.Parameter) -> nn.Module:
    """Modules within each other that hold one parameter under a name."""
    outer = module = nn.Module()
    *path, last = name.split(".")
    for part in path:
        inner = nn.Module()
        module.add_module(part, inner)
        module = inner
    module.register_parameter(last, parameter)
    return outer


def _slices(num_experts: int, nbytes: int) -> Iterator[range]:
    """The experts of a stack of so many bytes, as many at a time as are quantised together."""
    step = max(_SLICE * num_experts // max(nbytes, 1), 1)
    yield from (range(begin, min(begin + step, num_experts)) for begin in range(0, num_experts, step))


def _check_room(target: Path, needed: int, shard: int) -> None:
    """Refuse to begin what the disk has no room for: the weights, and a shard until it is full."""
    home = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(home).free
    if free < needed + shard + _MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"the quantised weights need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free",
            str(target),
        )


def _copy_others(source: Path, stage: Path) -> None:
    """Put the tokenizer's files and the settings of generation beside the weights."""
    for pattern in (*GENERATION_CONFIG_FILES, *TOKENIZER_FILES):
        for path in source.glob(pattern):
            if path.name != CONFIG_NAME and path.is_file() and path.parent == source:
                shutil.copyfile(path, stage / path.name)
