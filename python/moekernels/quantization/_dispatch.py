"""What operations of torch do with a quantised weight: each is one of its parts, or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekernels.quantization.weight import QuantizedWeight

_aten = torch.ops.aten
_handlers: dict[Any, Callable[..., Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on a quantised weight.

    Raises:
        RuntimeError: there is no such operation on one, as torch says where an operation is not supported.
    """
    handler = _handlers.get(func)
    if handler is None:
        raise RuntimeError(
            f"QuantizedWeight: {func} does not work on a quantised weight; multiply with moekernels.ops or "
            "torch.nn.functional.linear, or call dequantize() first"
        )
    return handler(*args, **kwargs)


def _handles(*names: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _handlers.update(dict.fromkeys(names, handler))
        return handler

    return register


@_handles(_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
def _alias(weight: QuantizedWeight) -> QuantizedWeight:
    return weight._like(dict(weight.parts))


@_handles(_aten.clone.default)
def _clone(weight: QuantizedWeight, memory_format: Any = None) -> QuantizedWeight:
    return weight._map(torch.clone)


@_handles(_aten._to_copy.default)
def _to_copy(
    weight: QuantizedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **_: Any,
) -> QuantizedWeight:
    parts = {name: part.to(device, non_blocking=non_blocking, copy=True) for name, part in weight.parts.items()}
    if dtype is not None and not dtype.is_floating_point:
        raise RuntimeError(f"QuantizedWeight: cannot become {dtype}; call dequantize() first")
    return weight._like(parts, dtype=dtype)


@_handles(_aten.empty_like.default)
def _empty_like(weight: QuantizedWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> QuantizedWeight:
    parts = {name: torch.empty_like(part, device=device) for name, part in weight.parts.items()}
    return weight._like(parts, dtype=dtype)


@_handles(_aten.copy_.default)
def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedWeight):
        return target.copy_(source.dequantize(target.dtype), non_blocking)
    if not isinstance(source, QuantizedWeight):
        raise RuntimeError(
            f"QuantizedWeight: cannot copy a tensor of {source.dtype} into a {target.format.name} weight; quantize it"
        )
    if (source.format, source.logical_shape) != (target.format, target.logical_shape):
        raise RuntimeError(
            f"QuantizedWeight: cannot copy {source.format} {list(source.logical_shape)} into {target.format} "
            f"{list(target.logical_shape)}"
        )
    for name, part in target.parts.items():
        part.copy_(source.parts[name], non_blocking)
    return target


def _experts(weight: QuantizedWeight, dim: int, what: str) -> None:
    if weight.dim() != 3 or dim not in (0, -3):
        raise RuntimeError(
            f"QuantizedWeight: {what} takes experts of a stack [E, N, K]; got {list(weight.shape)}, {dim=}"
        )


@_handles(_aten.select.int)
def _select(weight: QuantizedWeight, dim: int, index: int) -> QuantizedWeight:
    _experts(weight, dim, "an index")
    return weight._like({name: part[index] for name, part in weight.parts.items()}, weight.logical_shape[1:])


@_handles(_aten.unbind.int)
def _unbind(weight: QuantizedWeight, dim: int = 0) -> list[QuantizedWeight]:
    _experts(weight, dim, "unbind")
    return [_select(weight, 0, expert) for expert in range(weight.logical_shape[0])]


@_handles(_aten.slice.Tensor)
def _slice(
    weight: QuantizedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantizedWeight:
    shape = weight.logical_shape
    dim %= len(shape)
    begin, stop, step = slice(start, end, step).indices(shape[dim])
    if dim == len(shape) - 2 and step == 1:
        return weight.rows(begin, max(stop, begin))
    if dim == len(shape) - 1 and (begin, stop, step) == (0, shape[-1], 1):
        return _alias(weight)
    _experts(weight, dim, "a slice")
    parts = {name: part[begin:stop:step] for name, part in weight.parts.items()}
    return weight._like(parts, (len(range(begin, stop, step)), *shape[1:]))


@_handles(_aten.index.Tensor)
def _index(weight: QuantizedWeight, indices: Sequence[Tensor | None]) -> QuantizedWeight:
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        raise RuntimeError("QuantizedWeight: only experts can be taken by an index, one vector of them")
    return _index_select(weight, 0, indices[0])


@_handles(_aten.index_select.default)
def _index_select(weight: QuantizedWeight, dim: int, index: Tensor) -> QuantizedWeight:
    _experts(weight, dim, "an index")
    parts = {name: part[index] for name, part in weight.parts.items()}
    return weight._like(parts, (next(iter(parts.values())).shape[0], *weight.logical_shape[1:]))


@_handles(_aten.embedding.default)
def _embedding(
    weight: QuantizedWeight, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Only the rows that are looked up are dequantised."""
    if weight.dim() != 2:
        raise RuntimeError(f"QuantizedWeight: an embedding is a matrix [N, K], got {list(weight.shape)}")
    columns = weight.logical_shape[-1]
    if indices.numel() == 0:
        return torch.empty(*indices.shape, columns, dtype=weight.dtype, device=indices.device)
    parts = weight.format.take(weight.parts, columns, indices.reshape(-1))
    return weight._like(parts, (indices.numel(), columns)).dequantize().view(*indices.shape, columns)


def _alike(weights: Sequence[Any], what: str) -> None:
    first = weights[0]
    for weight in weights:
        if not isinstance(weight, QuantizedWeight) or weight.format != first.format:
            other = weight.format if isinstance(weight, QuantizedWeight) else "a plain tensor"
            raise RuntimeError(f"QuantizedWeight: {what} takes weights of one format; got {first.format} and {other}")


@_handles(_aten.stack.default)
def _stack(weights: Sequence[QuantizedWeight], dim: int = 0) -> QuantizedWeight:
    _alike(weights, "stack")
    first = weights[0]
    if dim != 0 or any(weight.logical_shape != first.logical_shape or weight.dim() != 2 for weight in weights):
        shapes = [list(weight.logical_shape) for weight in weights]
        raise RuntimeError(f"QuantizedWeight: stack takes matrices of one shape, in dimension 0; got {shapes}, {dim=}")
    parts = {name: torch.stack([weight.parts[name] for weight in weights]) for name in first.parts}
    return first._like(parts, (len(weights), *first.logical_shape))


@_handles(_aten.cat.default)
def _cat(weights: Sequence[QuantizedWeight], dim: int = 0) -> QuantizedWeight:
    _alike(weights, "cat")
    first = weights[0]
    shape = list(first.logical_shape)
    dim %= len(shape)
    others = [[*weight.logical_shape[:dim], *weight.logical_shape[dim + 1 :]] for weight in weights]
    if dim == len(shape) - 1 or any(other != others[0] for other in others):
        shapes = [list(weight.logical_shape) for weight in weights]
        raise RuntimeError(f"QuantizedWeight: cat joins rows or experts of equal width; got {shapes}, {dim=}")
    sizes = [weight.logical_shape[dim] for weight in weights]
    shape[dim] = sum(sizes)
    if dim == len(shape) - 2:
        parts = first.format.join([weight.parts for weight in weights], shape[-1], sizes)
    else:
        parts = {name: torch.cat([weight.parts[name] for weight in weights]) for name in first.parts}
    return first._like(parts, shape)


@_handles(_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default)
def _view(weight: QuantizedWeight, shape: Sequence[int], **_: Any) -> QuantizedWeight:
    if list(shape) != list(weight.logical_shape):
        raise RuntimeError(f"QuantizedWeight: cannot become {list(shape)} from {list(weight.logical_shape)}")
    return _alias(weight)


@_handles(_aten.is_pinned.default)
def _is_pinned(weight: QuantizedWeight, device: Any = None) -> bool:
    return all(part.is_pinned() for part in weight.parts.values())


@_handles(_aten._pin_memory.default)
def _pin_memory(weight: QuantizedWeight, device: Any = None) -> QuantizedWeight:
    return weight._map(Tensor.pin_memory)


@_handles(_aten.equal.default)
def _equal(first: Any, second: Any) -> bool:
    """Whether they are the same bits: of one format, with equal parts."""
    if not (isinstance(first, QuantizedWeight) and isinstance(second, QuantizedWeight)):
        return False
    if (first.format, first.logical_shape) != (second.format, second.logical_shape):
        return False
    return all(torch.equal(part, second.parts[name]) for name, part in first.parts.items())
