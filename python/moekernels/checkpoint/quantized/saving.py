"""A model's weights as the tensors of a file, quantised ones in bitsandbytes' layout or in our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moekernels.checkpoint.keymap import KeyMap
from moekernels.checkpoint.loader import checkpoint_tensors
from moekernels.checkpoint.quantized import bitsandbytes, own
from moekernels.quantization import Format, QuantizedWeight


def weight_of(name: str) -> str:
    """What the names of the tensors of one weight have in common in bitsandbytes' layout.

    transformers 4 wants them in one shard.
    """
    return name.removesuffix(".SCB").partition(".weight")[0]


def quantized_tensors(
    weights: Mapping[str, Tensor],
    key_map: KeyMap,
    bitsandbytes_storage: torch.dtype | None,
    dtype: torch.dtype,
    first_expert: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a file.

    Args:
        weights: parameters by name.
        key_map: the names of the architecture.
        bitsandbytes_storage: the dtype of 4-bit codes in bitsandbytes' layout; None is our layout.
        dtype: of the model.
        first_expert: which expert the first one of stacks is.
    """
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedWeight):
            yield from checkpoint_tensors({name: weight}, key_map, first_expert)
        elif bitsandbytes_storage is None:
            yield from own.tensors_of(name, weight.parts, weight.shape)
        else:
            yield from _per_expert(name, weight, key_map, bitsandbytes_storage, dtype, first_expert)


def experts_slice(
    name: str,
    weight: Tensor,
    experts: range,
    num_experts: int,
    key_map: KeyMap,
    bitsandbytes_storage: torch.dtype | None,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """What some experts of a stack add to a file: names, tensors, and the shapes of the whole ones they are rows of.

    Args:
        name: of the stack.
        weight: those experts of it.
        experts: which ones they are; slices come in this order.
        num_experts: of the stack.
        key_map, bitsandbytes_storage, dtype: as of :func:`quantized_tensors`.
    """
    tensors = quantized_tensors({name: weight}, key_map, bitsandbytes_storage, dtype, experts.start)
    if not isinstance(weight, QuantizedWeight) or bitsandbytes_storage is not None:
        yield from ((key, tensor, tuple(tensor.shape)) for key, tensor in tensors)
        return
    for key, tensor in own.tensors_of(name, weight.parts, torch.Size((num_experts, *weight.shape[1:]))):
        if key != name + own.SHAPE:
            yield key, tensor, (num_experts, *tensor.shape[1:])
        elif experts.start == 0:
            yield key, tensor, tuple(tensor.shape)


def _per_expert(
    name: str, weight: QuantizedWeight, key_map: KeyMap, storage: torch.dtype, dtype: torch.dtype, first_expert: int
) -> Iterator[tuple[str, Tensor]]:
    """One matrix for each expert and projection, as transformers 4 has them."""
    canonical = key_map.canonical(name)
    prefix = name.removesuffix(canonical)
    num_rows, columns = weight.shape[-2:]
    for key, place in key_map.checkpoint_names(canonical, tuple(weight.shape), first_expert):
        parts: Mapping[str, Tensor] = weight.parts
        if place.expert is not None:
            parts = {part: tensor[place.expert] for part, tensor in parts.items()}
        begin, end = place.rows(num_rows)
        format, parts = _rows(weight.format, parts, columns, begin, end)
        shape = (end - begin, columns)
        yield from bitsandbytes.tensors_of(prefix + key, format, parts, shape, dtype, storage)


def _rows(
    format: Format, parts: Mapping[str, Tensor], columns: int, begin: int, end: int
) -> tuple[Format, Mapping[str, Tensor]]:
    """The parts of some rows; without double quantisation if its blocks go beyond them."""
    try:
        return format, format.rows(parts, columns, begin, end)
    except ValueError:
        if not format.options.get("double_quant"):
            raise
    plain = dataclasses.replace(format, double_quant=False)  # type: ignore[call-arg]
    whole = {"codes": parts["codes"], "absmax": format.scales(parts)}  # type: ignore[attr-defined]
    return plain, plain.rows(whole, columns, begin, end)
