"""Filling quantised parameters: by quantising what a file holds, or by copying what is quantised in it already."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint.keymap import Place
from moekernels.quantization import Format, QuantizedWeight


def fitting(format: Format, shape: tuple[int, ...], parts: int) -> Format | None:
    """The format in which a parameter can be filled piece by piece.

    Blocks of a matrix run on from row to row, so that two pieces may share one. Double quantisation, whose blocks are
    the largest, is undone where that would be so; the weights keep their values.

    Args:
        format: of the pieces.
        shape: of the parameter.
        parts: how many pieces of a matrix there are, one below the other.

    Returns:
        None if pieces share a block even so.
    """
    if parts == 1:
        return format
    weights = shape[-2] // parts * shape[-1]
    candidates = [format]
    if format.options.get("double_quant"):
        candidates.append(dataclasses.replace(format, double_quant=False))  # type: ignore[call-arg]
    for candidate in candidates:
        if all(weights % part.weights == 0 for part in candidate.parts(shape[-1]).values()):
            return candidate
    return None


def empty(format: Format, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> QuantizedWeight:
    """A quantised weight whose parts are allocated and not initialised."""
    weights = shape[-2] * shape[-1]
    parts = {
        name: torch.empty(*shape[:-2], part.size(weights), dtype=part.dtype, device=device)
        for name, part in format.parts(shape[-1]).items()
    }
    return QuantizedWeight(parts, format, shape, dtype=dtype)


def fill(target: QuantizedWeight, place: Place, source: Tensor) -> None:
    """Put a tensor of a checkpoint into its place of a quantised weight.

    Args:
        target: the parameter.
        place: what of it the tensor is.
        source: ``[n, K]``, or ``[E, n, K]`` for all experts at once; quantised in the target's format but for double
            quantisation, or not quantised.
    """
    rows, columns = target.shape[-2:]
    parts = target.parts if place.expert is None else {n: part[place.expert] for n, part in target.parts.items()}
    parts = target.format.rows(parts, columns, *place.rows(rows))
    if isinstance(source, QuantizedWeight) and source.format == target.format:
        for name, part in source.parts.items():
            parts[name].copy_(part)
        return
    for index in range(len(source)) if source.ndim == 3 else (...,):  # matrix by matrix, to need little memory
        for name, part in _matrix(source, index, target.format).items():
            parts[name][index].copy_(part)


def _matrix(source: Tensor, index: Any, format: Format) -> Mapping[str, Tensor]:
    """The parts of one matrix of the source."""
    if not isinstance(source, QuantizedWeight):
        return format.quantize(source[index].detach())
    parts = {name: part[index] for name, part in source.parts.items()}
    return {"codes": parts["codes"], "absmax": source.format.scales(parts)}  # type: ignore[attr-defined]
