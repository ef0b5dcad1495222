"""The object that stands for a quantised weight wherever a parameter does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekernels.quantization.formats import Format, Layout, Parts, parse_format

functions: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What stands for a function of torch that is called with a quantised weight. The ops enter themselves here."""

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class QuantizedWeight(Tensor):
    """A weight ``[N, K]``, or a stack ``[E, N, K]``, stored in few bits.

    To torch it is a tensor of the logical shape and of the dtype that products are computed in. It can be a parameter
    of a module (``nn.Parameter(weight, requires_grad=False)``); it stands in `state_dict`, moves, copies, pickles and
    loads. ``stack[e]`` and ``stack[a:b]`` are views of experts. It cannot be written, but for `copy_` of one of the
    same format, and has no gradient; what it is multiplied with has one.

    Args:
        parts: the tensors of the format by name, flat, of a stack ``[E, ...]``; kept, not copied.
        format: a format, or the name of one.
        shape: ``[N, K]`` or ``[E, N, K]``.
        dtype: the dtype that it stands for.
        options: those of the format, where it is a name.

    Raises:
        ValueError: there is no such format, the shape does not divide into its groups, or the parts are not those of
            a weight of this shape.
    """

    parts: dict[str, Tensor]
    """The tensors it consists of."""
    format: Format
    """How it is stored."""
    logical_shape: torch.Size
    compute_dtype: torch.dtype
    _layouts: list[Layout | None]  # once it is known, that of the kernels

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        format: str | Format,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.bfloat16,
        requires_grad: bool = False,
        **options: Any,
    ) -> QuantizedWeight:
        if requires_grad:
            raise ValueError(_NO_GRADIENT)
        if dtype not in _COMPUTE_DTYPES:
            raise ValueError(f"QuantizedWeight: dtype must be one of {_names(_COMPUTE_DTYPES)}; got {dtype}")
        format = parse_format(format, "QuantizedWeight", **options)
        format.check_parts(parts, shape, "QuantizedWeight")
        return _make(cls, dict(parts), format, torch.Size(shape), dtype)

    @classmethod
    def quantize(
        cls, weight: Tensor, format: str | Format, *, dtype: torch.dtype | None = None, **options: Any
    ) -> QuantizedWeight:
        """See :func:`moekernels.ops.quantize`."""
        chosen = parse_format(format, **options)
        if isinstance(weight, QuantizedWeight):
            raise ValueError(f"quantize: weight is quantised already, to {weight.format.name}; dequantize it first")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"quantize: weight must be float32, bfloat16 or float16, got {weight.dtype}")
        chosen.check_shape(weight.shape, "quantize")
        with torch.no_grad():
            weight = weight.detach()
            if weight.dim() == 2:
                parts = chosen.quantize(weight.contiguous())
            else:
                pieces = [chosen.quantize(matrix.contiguous()) for matrix in weight]
                parts = {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}
        return _make(cls, parts, chosen, weight.shape, dtype or weight.dtype)

    @property
    def num_bytes(self) -> int:
        """The memory that the parts take."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def apart(self) -> QuantizedWeight:
        """The same values with codes and scales apart, as kernels want them: `q4_0` as `int4`, `q8_0` as `int8_groups`.

        The weight itself where they are, or where there is no such format.
        """
        format, parts = self.format.apart(self.parts)
        if format is self.format:
            return self
        return _make(type(self), parts, format, self.logical_shape, self.compute_dtype)

    @property
    def kernel_layout(self) -> Layout | None:
        """How kernels read it, a matrix as a stack of one; None: they do not. Made once."""
        if not self._layouts:
            parts = self.parts
            if len(self.logical_shape) == 2:
                parts = {name: part.unsqueeze(0) for name, part in parts.items()}
            self._layouts.append(self.format.layout(parts, self.logical_shape[-1]))
        return self._layouts[0]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain tensor of `dtype`, by default its own: float32 values, rounded once."""
        shape, dtype = self.logical_shape, dtype or self.compute_dtype
        rows, columns = shape[-2:]
        with torch.no_grad():
            if len(shape) == 2:
                return self.format.dequantize(self.parts, rows, columns).to(dtype)
            out = torch.empty(shape, dtype=dtype, device=next(iter(self.parts.values())).device)
            for expert in range(shape[0]):
                out[expert] = self.format.dequantize(
                    {name: part[expert] for name, part in self.parts.items()}, rows, columns
                )
            return out

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        """The rows ``begin .. end`` of every matrix, as a view of the parts.

        Raises:
            ValueError: something that is stored once covers rows on both sides of an end.
        """
        shape = self.logical_shape
        parts = self.format.rows(self.parts, shape[-1], begin, end)
        return self._like(parts, (*shape[:-2], end - begin, shape[-1]))

    def _like(
        self,
        parts: dict[str, Tensor],
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedWeight:
        size = self.logical_shape if shape is None else torch.Size(shape)
        return _make(type(self), parts, self.format, size, dtype or self.compute_dtype)

    def _map(self, function: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        return self._like({name: function(part) for name, part in self.parts.items()})

    # --- what torch asks of a tensor that is made of tensors ---------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"_part_{name}" for name in self.parts], (self.format, self.compute_dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, outer_size: Sequence[int], outer_stride: Any
    ) -> QuantizedWeight:
        format, dtype = context
        parts = {name.removeprefix("_part_"): part for name, part in inner.items()}
        return _make(cls, parts, format, torch.Size(outer_size), dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_part_"):
            return self.parts[name.removeprefix("_part_")]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in functions:
            return functions[func](*args, **kwargs)
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__) and (*args, True)[1]:  # type: ignore[attr-defined]
            raise ValueError(_NO_GRADIENT)
        with torch._C.DisableTorchFunctionSubclass():  # it makes quantised weights of all results
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from moekernels.quantization._dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        options = "".join(f", {name}={value!r}" for name, value in self.format.options.items())
        return (
            f"{type(self).__name__}({self.format.name!r}{options}, shape={list(self.logical_shape)}, "
            f"dtype={self.compute_dtype}, device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            copied: Tensor = self._map(torch.clone)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=False)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        is_parameter = isinstance(self, torch.nn.Parameter)
        shape, options = tuple(self.logical_shape), self.format.options
        return _rebuild, (self.parts, self.format.name, options, shape, self.compute_dtype, is_parameter)


_NO_GRADIENT = (
    "QuantizedWeight: a quantised weight cannot be trained; leave requires_grad False, and train adapters beside it or "
    "the weight it was made from"
)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _make(
    cls: type[QuantizedWeight], parts: dict[str, Tensor], format: Format, shape: torch.Size, dtype: torch.dtype
) -> QuantizedWeight:
    """A weight of parts that are known to fit."""
    device = next(iter(parts.values())).device
    weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
    weight.parts, weight.format = parts, format
    # Asking a subclass of Tensor for its own shape or dtype costs microseconds.
    weight.logical_shape, weight.compute_dtype = shape, dtype
    weight._layouts = []
    return weight


def _rebuild(
    parts: Parts, format: str, options: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, is_parameter: bool
) -> Tensor:
    """From a pickle: checked as if it were made by hand."""
    weight = QuantizedWeight(parts, format, shape, dtype=dtype, **options)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def _share_memory(weight: QuantizedWeight) -> QuantizedWeight:
    for part in weight.parts.values():
        part.share_memory_()
    return weight


functions[Tensor.share_memory_] = _share_memory
# Every parameter is made with it, and torch's way to its handler imports sympy (50 MB) at the first call.
functions[Tensor.detach] = lambda weight: weight._like(dict(weight.parts))
functions[Tensor.is_shared] = lambda weight: all(part.is_shared() for part in weight.parts.values())

# What torch.load may make of a file, with weights_only.
torch.serialization.add_safe_globals([_rebuild])
