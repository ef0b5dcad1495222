"""Putting streamed experts into a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import nn

from moekernels.checkpoint import CheckpointError, CheckpointReader, KeyMap, Reader, tensor_offsets
from moekernels.checkpoint.packing import fitting
from moekernels.checkpoint.quantized import QuantizedReader
from moekernels.expert_memory.budget import ExpertMemory, auto_budget, parse_expert_memory
from moekernels.expert_memory.cache import ExpertCache
from moekernels.expert_memory.experts import StreamedExperts
from moekernels.expert_memory.layout import ExpertSource, Layout, Stored, Weight, part_name, spans_of
from moekernels.nn import GroupedExperts
from moekernels.quantization import Format

#: Parameter -> (expert, part) -> name in the checkpoint, as :class:`moekernels.checkpoint.LoadReport` has them.
Sources = Mapping[str, Mapping[tuple[int | None, int], str]]


def is_streamed(model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter of the model is experts', by its name."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, GroupedExperts))
    return lambda name: name.startswith(layers)


def find_experts(model: nn.Module, reader: Reader, key_map: KeyMap, is_split: bool) -> dict[str, Stored]:
    """Where the tensors of experts lie in a checkpoint, by their names there. Found out before weights are loaded.

    Raises:
        ValueError: the model has no experts or is split over devices, or there are weights in place of files.
        CheckpointError: an expert cannot be read by itself.
    """
    if is_split:
        raise ValueError("expert_memory: the whole model must be on one device, got a device_map that splits it")
    if not any(isinstance(module, GroupedExperts) for module in model.modules()):
        raise ValueError(f"expert_memory: {type(model).__name__} has no experts")
    files = reader.reader if isinstance(reader, QuantizedReader) else reader
    if not isinstance(files, CheckpointReader):
        raise ValueError("expert_memory: experts are read from a checkpoint's files, so there can be no state_dict")
    offsets = {path: tensor_offsets(path) for path in files.files}

    def stored(name: str) -> Stored:
        info = files.tensors[name]
        offset = offsets[info.file].get(name)
        if offset is None or info.dtype is None:
            raise CheckpointError(
                f"{info.file}: {name!r} cannot be read by itself from a file of this kind; to make one from which it "
                f"can: moekernels repack --model {reader.directory} --output DIR"
            )
        return Stored(name, info.file, offset, info.shape, info.dtype)

    is_experts = is_streamed(model)
    parameters = {key_map.canonical(name) for name, _ in model.named_parameters() if is_experts(name)}
    found = {}
    for name, info in reader.tensors.items():
        if not info.is_weight or key_map.place(name).parameter not in parameters:
            continue
        if info.format is None:
            found[name] = stored(name)
            continue
        assert isinstance(reader, QuantizedReader), name
        parts = reader.parts_in_files(name)
        if parts is None:
            raise CheckpointError(
                f"{info.file}: the scales of {name!r} have to be put in order; load the model without expert_memory "
                "and save it, to make a checkpoint whose experts can be read one by one"
            )
        dtypes = {part: spec.dtype for part, spec in info.format.parts(info.shape[-1]).items()}
        tensors = {
            part: source if isinstance(source, float) else _as_part(stored(source), dtypes[part])
            for part, source in parts.items()
        }
        found[name] = Stored(name, info.file, 0, info.shape, info.dtype or torch.uint8, info.format, tensors)
    return found


def _as_part(stored: Stored, dtype: torch.dtype) -> Stored:
    """Codes as what they are, where they were stored as bytes of another dtype. Scales are converted when read."""
    if dtype.is_floating_point:
        return stored
    nbytes = math.prod(stored.shape) * stored.dtype.itemsize
    return stored._replace(shape=(nbytes // dtype.itemsize,), dtype=dtype)


def stream_experts(
    model: nn.Module,
    stored: Mapping[str, Stored],
    sources: Sources,
    expert_memory: ExpertMemory,
    *,
    dtype_of: Callable[[str], torch.dtype],
    compute_dtype: torch.dtype | None,
    device: torch.device,
) -> ExpertCache:
    """Replace every :class:`GroupedExperts` of a model by :class:`StreamedExperts`. No weight requires a gradient then.

    Args:
        model: the experts' parameters may be on the meta device; the others are loaded.
        stored: of :func:`find_experts`.
        sources: which of them make up the experts' parameters.
        expert_memory: the budget; no more than all experts take is used of it.
        dtype_of: of a parameter, by its name.
        compute_dtype: what products with quantised weights are computed in; None is the dtype of the parameter.
        device: where the experts are to be.

    Returns:
        The cache that all layers share.

    Raises:
        ValueError: the budget is no size, or too small for an expert.
        CheckpointError: the parts of a quantised weight do not fit together.
        ExpertReadError: a file cannot be opened.
    """
    budget = parse_expert_memory(expert_memory)
    found = {name: module for name, module in model.named_modules() if isinstance(module, GroupedExperts)}
    layers = [_experts(path, module, stored, sources, dtype_of, compute_dtype) for path, module in found.items()]
    total = sum(expert.layout.nbytes for layer in layers for expert in layer)
    cache = ExpertCache(layers, min(auto_budget(device) if budget == "auto" else budget, total), device)
    for layer, (path, module) in enumerate(found.items()):
        down = next(weight for weight in layers[layer][0].layout.weights if weight.name == "down_proj")
        is_quantized = any(weight.format is not None for weight in layers[layer][0].layout.weights)
        streamed = StreamedExperts(module, cache, layer, down.dtype, device, is_quantized=is_quantized)
        model.set_submodule(path, streamed)
    model.requires_grad_(False)
    return cache


def _experts(
    path: str,
    module: GroupedExperts,
    stored: Mapping[str, Stored],
    sources: Sources,
    dtype_of: Callable[[str], torch.dtype],
    compute_dtype: torch.dtype | None,
) -> list[ExpertSource]:
    """The experts of one layer."""
    weights: list[Weight] = []
    fields: dict[str, Mapping[tuple[int | None, int], Stored | float]] = {}
    for name, parameter in module.named_parameters():
        tensors = {place: stored[key] for place, key in sources[f"{path}.{name}"].items()}
        shape, dtype = tuple(parameter.shape[1:]), dtype_of(f"{path}.{name}")
        format = _format_of(f"{path}.{name}", shape, tensors)
        if format is None:
            weights.append(Weight(name, shape, dtype))
            fields[name] = tensors
        else:
            weights.append(Weight(name, shape, compute_dtype or dtype, format))
            for part in format.parts(shape[-1]):
                fields[part_name(name, part)] = {place: tensor.parts[part] for place, tensor in tensors.items()}
    layout = Layout.of(weights)
    return [
        ExpertSource(
            f"expert {expert} of {path}",
            layout,
            tuple(chain.from_iterable(spans_of(field, expert, fields[field.name]) for field in layout.fields)),
        )
        for expert in range(module.num_experts)
    ]


def _format_of(name: str, shape: tuple[int, ...], tensors: Mapping[tuple[int | None, int], Stored]) -> Format | None:
    """What a weight of an expert is stored in; None is whole."""
    formats = {tensor.format for tensor in tensors.values()}
    first = next(iter(formats))
    num_parts = 1 + max(part for _, part in tensors)
    if len(formats) == 1 and (first is None or fitting(first, shape, num_parts) == first):
        return first
    kinds = ", ".join(sorted("whole" if kind is None else kind.name for kind in formats))
    raise CheckpointError(
        f"{name}: the checkpoint holds its parts differently, or in blocks that two of them share ({kinds}, perhaps "
        "with double quantisation), so that it cannot be read expert by expert; load the model without expert_memory "
        "and save it, which stores it so that it can"
    )
