"""Products with quantised weights: by a kernel that reads their codes, or of matrices that are dequantised in turn.

The kernel is for inference on a CPU; on a GPU for few rows, and in 16 bits for any number of them and for gradients.
Else one matrix is whole at a time; a graph for gradients keeps the codes, and dequantises them again in the backward
pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekernels._constants import made_once
from moekernels._library import build_info
from moekernels._settings import autocast_dtype, is_batch_invariant
from moekernels.ops._call import KERNEL_DTYPES, call, is_transformed, wants_gradient
from moekernels.ops._expert_weights import BIAS, ExpertTensors, stacked, tensor_list
from moekernels.ops._gradients import sum_copies
from moekernels.quantization import QuantizedWeight

_Function = TypeVar("_Function", bound=Callable[..., Any])


_compiler: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback


def not_compiled(function: _Function) -> _Function:
    """The compiler, which cannot look into a quantised weight, leaves a function to Python, and what that calls.

    That is what torch.compiler.disable does; but it would import the whole compiler, and takes time in every call.
    """

    @functools.wraps(function)
    def leave_alone(*arguments: Any, **options: Any) -> Any:
        if _compiler() is None:
            return function(*arguments, **options)
        return torch.compiler.disable(function)(*arguments, **options)

    leave_alone._torchdynamo_disable = True  # type: ignore[attr-defined]
    return leave_alone  # type: ignore[return-value]


def is_quantized(weight: ExpertTensors | None) -> bool:
    """Whether a weight, or any of a sequence of them, is quantised."""
    if weight is None or isinstance(weight, Tensor):
        return isinstance(weight, QuantizedWeight)
    return any(isinstance(matrix, QuantizedWeight) for matrix in weight)


def is_quantized_matrix(weight: Tensor) -> TypeGuard[QuantizedWeight]:
    return isinstance(weight, QuantizedWeight)


def compute_dtype(rows: Tensor) -> torch.dtype:
    """What a product with these rows is computed in: the codes of a weight have no dtype to agree with."""
    return autocast_dtype(rows.device) or rows.dtype


# kDecodeRows, kDecodeRowsPerExpert and kMaxExpertsPerLaunch of csrc/cuda/gemm/tile_config.h: where a GPU's grouped GEMM
# is but a stream of weights, whole or quantised.
_FEW_ROWS, _FEW_ROWS_PER_EXPERT, _MOST_EXPERTS = 32, 4, 1024
_HAS_CUDA = bool(build_info()["cuda_archs"])
_TILED_DTYPES = (torch.bfloat16, torch.float16)


def are_few_rows(num_rows: int, num_experts: int) -> bool:
    """Whether a GPU streams codes past so many rows of all experts together."""
    return num_experts <= _MOST_EXPERTS and (num_rows <= _FEW_ROWS or num_rows <= _FEW_ROWS_PER_EXPERT * num_experts)


def has_kernel(
    weight: ExpertTensors, rows: Tensor, *others: Tensor | None, num_rows: int, transposed: bool = False
) -> TypeGuard[QuantizedWeight]:
    """Whether :func:`multiply` takes this weight: `rows` and `others` are what would need gradients.

    Args:
        num_rows: of all experts together.
        transposed: as of :func:`multiply`.
    """
    if not isinstance(weight, QuantizedWeight) or compute_dtype(rows) not in KERNEL_DTYPES:
        return False
    if is_transformed() or weight.kernel_layout is None:
        return False
    forward_only = not transposed and not wants_gradient(rows, *others)
    return (rows.is_cpu and forward_only) or (rows.is_cuda and _has_gpu_kernel(weight, rows, num_rows, forward_only))


def _has_gpu_kernel(weight: QuantizedWeight, rows: Tensor, num_rows: int, forward_only: bool) -> bool:
    shape, layout = weight.logical_shape, weight.kernel_layout
    num_experts = shape[0] if len(shape) == 3 else 1
    if not _HAS_CUDA or layout is None or num_experts > _MOST_EXPERTS:
        return False
    if layout.order == "bytes" and shape[-1] % 16:
        return False
    if compute_dtype(rows) in _TILED_DTYPES:
        return True
    return forward_only and not is_batch_invariant() and are_few_rows(num_rows, num_experts)


def multiply(
    rows: Tensor,
    weight: QuantizedWeight,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """The grouped GEMM by a kernel that reads codes. ``[N, K]`` -> ``[N, M]``, or half of that when gated.

    `transposed`, of a weight ``[E, K, M]``, goes with no bias, activation or gate.
    """
    shape, dtype = weight.logical_shape, compute_dtype(rows)
    out_features, in_features = shape[-2:][::-1] if transposed else shape[-2:]
    if rows.dim() != 2 or rows.shape[1] != in_features:
        raise ValueError(
            f"moekernels::{'linear' if len(shape) == 2 else 'grouped_gemm'}: rows must have the in_features of weight, "
            f"{in_features}, got {list(rows.shape)}"
        )
    if len(shape) == 3 and expert_offsets.shape[0] != shape[0] + 1:
        raise ValueError(
            f"moekernels::grouped_gemm: weight must be [num_experts = {expert_offsets.shape[0] - 1}, N, K], "
            f"got {list(shape)}"
        )
    if autocast_dtype(rows.device) and bias is not None:
        bias = bias.to(dtype)
    multiplied = _Product.apply if wants_gradient(rows, bias, row_scale) else _product
    return multiplied(
        rows.to(dtype), bias, row_scale, expert_offsets, token_of_row, weight, out_features, transposed,
        activation, gated,
    )  # fmt: skip


def _product(
    rows: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    expert_offsets: Tensor,
    token_of_row: Tensor | None,
    weight: QuantizedWeight,
    out_features: int,
    transposed: bool,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    layout = weight.kernel_layout
    assert layout is not None
    rounds = layout.int8_rows and rows.is_cpu
    return call(
        torch.ops.moekernels.quantized_gemm.default,
        rows, layout.codes, layout.scales, layout.tables, layout.order, layout.group, layout.unit, out_features,
        expert_offsets, bias, activation, gated, row_scale, token_of_row, is_batch_invariant(), rounds,
        layout.int8_threshold if rounds else 0.0, transposed,
    )  # fmt: skip


class _Product(torch.autograd.Function):
    """With gradients of all but the weight, of which the codes are kept, and nothing waits for the device."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bias: Tensor | None,
        row_scale: Tensor | None,
        expert_offsets: Tensor,
        token_of_row: Tensor | None,
        *others: Any,
    ) -> Tensor:
        ctx.weight, ctx.out_features, ctx.transposed, ctx.activation, ctx.gated = others
        # What the epilogue was given is computed once more, where its gradient asks for it.
        ctx.recomputes = ctx.activation != "none" or ctx.gated or row_scale is not None
        kept = (rows, bias) if ctx.recomputes else (None, None)
        ctx.save_for_backward(*kept, row_scale, expert_offsets, token_of_row)
        ctx.rows_shape = rows.shape
        return _product(rows, bias, row_scale, expert_offsets, token_of_row, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, bias, row_scale, expert_offsets, token_of_row = ctx.saved_tensors
        needs_rows, needs_bias, needs_scale, *_ = ctx.needs_input_grad
        grad_rows = grad_bias = grad_scale = None
        if ctx.recomputes:
            linear = _product(
                rows, bias, None, expert_offsets, token_of_row, ctx.weight, ctx.out_features, ctx.transposed
            )
            grad_out, _, grad_scale = torch.ops.moekernels.activation_grad(
                grad_out, linear, ctx.activation, ctx.gated, row_scale, expert_offsets, False, needs_scale
            )
        if needs_rows:
            num_rows, in_features = ctx.rows_shape
            grad_rows = _product(
                grad_out, None, None, expert_offsets, None, ctx.weight, in_features, not ctx.transposed
            )
            if token_of_row is not None:
                grad_rows = sum_copies(grad_rows, token_of_row, num_rows)
        if needs_bias:
            no_weight = grad_out.new_empty(grad_out.shape[0], 0)
            grad_bias = torch.ops.moekernels.grouped_weight_grad(
                grad_out, no_weight, expert_offsets, None, None, None, True, False
            )[1]
        return grad_rows, grad_bias, grad_scale if needs_scale else None, *[None] * 7


@made_once
def one_expert(num_rows: int, device: torch.device) -> Tensor:
    """The offsets of a single expert that owns all rows."""
    return torch.tensor([0, num_rows], dtype=torch.int32, device=device)


@contextmanager
def dequantized(matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Matrices one below the other as a plain one. What is recorded for gradients within is not it, but how to make it.

    Args:
        matrices: ``[N_i, K]``, quantised or not.
        dtype: that of the result ``[sum N_i, K]``.
    """

    def whole() -> Tensor:
        plain = [
            matrix.dequantize(dtype) if isinstance(matrix, QuantizedWeight) else matrix.to(dtype) for matrix in matrices
        ]
        return plain[0] if len(plain) == 1 else torch.cat(plain)

    weight = whole()
    storage = weight.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        is_weight = type(tensor) is Tensor and tensor.untyped_storage()._cdata == storage
        return (tensor.shape, tensor.stride()) if is_weight else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else whole().as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield weight


class ExpertMatrices:
    """The matrices of each expert, of a stack or of a sequence as :data:`ExpertTensors` says."""

    def __init__(self, op: str, name: str, weight: ExpertTensors, num_experts: int) -> None:
        if isinstance(weight, Tensor):
            if weight.dim() != 3 or weight.shape[0] != num_experts:
                raise ValueError(
                    f"moekernels::{op}: {name} must be [num_experts = {num_experts}, N, K], got {list(weight.shape)}"
                )
            self.matrices: Sequence[Tensor] = weight.unbind()
        else:
            self.matrices = weight
        if not num_experts or len(self.matrices) % num_experts:
            raise ValueError(
                f"moekernels::{op}: {name} must hold a multiple of num_experts = {num_experts} matrices, got "
                f"{len(self.matrices)}"
            )
        self.num_parts = len(self.matrices) // num_experts

    def __getitem__(self, expert: int) -> Sequence[Tensor]:
        return self.matrices[expert * self.num_parts : (expert + 1) * self.num_parts]


def expert_bounds(op: str, expert_offsets: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """Where the rows of each expert begin and end; read from the device.

    Raises:
        ValueError: the offsets fall, or exceed the number of rows.
    """
    offsets = expert_offsets.tolist()
    if not offsets or offsets[0] < 0 or offsets[-1] > num_rows or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(
            f"moekernels::{op}: expert_offsets must rise from 0 to at most {num_rows}, the number of rows, "
            f"got {offsets}"
        )
    return list(pairwise(offsets))


def bias_of_experts(bias: ExpertTensors | None, num_experts: int) -> Tensor | None:
    """As a stack ``[E, N]``."""
    return None if bias is None else stacked(tensor_list(bias), BIAS, num_experts)
