"""Products with quantised weights: by a kernel that reads their codes, or of matrices that are dequantised in turn.

The kernel is for inference on a CPU, and for few rows on a GPU. Else one matrix is whole at a time; a graph for
gradients keeps the codes, and dequantises them again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from moekernels._constants import made_once
from moekernels._library import build_info
from moekernels._settings import autocast_dtype, is_batch_invariant
from moekernels.ops._call import KERNEL_DTYPES, call, is_transformed, wants_gradient
from moekernels.ops._expert_weights import BIAS, ExpertTensors, stacked, tensor_list
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


def are_few_rows(num_rows: int, num_experts: int) -> bool:
    """Whether a GPU multiplies so many rows of all experts together by the codes of a weight."""
    return num_experts <= _MOST_EXPERTS and (num_rows <= _FEW_ROWS or num_rows <= _FEW_ROWS_PER_EXPERT * num_experts)


def streams(weight: ExpertTensors, rows: Tensor, *others: Tensor | None, num_rows: int) -> TypeGuard[QuantizedWeight]:
    """Whether the kernel takes this weight: `rows` and `others` are what would need gradients.

    Args:
        num_rows: of all experts together.
    """
    if not isinstance(weight, QuantizedWeight) or compute_dtype(rows) not in KERNEL_DTYPES:
        return False
    if wants_gradient(rows, *others) or is_transformed() or weight.kernel_layout is None:
        return False
    return rows.is_cpu or (rows.is_cuda and _streams_on_a_gpu(weight, num_rows))


def _streams_on_a_gpu(weight: QuantizedWeight, num_rows: int) -> bool:
    shape, layout = weight.logical_shape, weight.kernel_layout
    if not _HAS_CUDA or is_batch_invariant() or layout is None:
        return False
    in_features, num_experts = shape[-1], shape[0] if len(shape) == 3 else 1
    return are_few_rows(num_rows, num_experts) and (layout.order != "bytes" or in_features % 16 == 0)


def stream(
    rows: Tensor,
    weight: QuantizedWeight,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
) -> Tensor:
    """The grouped GEMM by the kernel that reads codes. ``[N, K]`` -> ``[N, M]``, or half of that when gated."""
    shape, layout, dtype = weight.logical_shape, weight.kernel_layout, compute_dtype(rows)
    if layout is None or rows.dim() != 2 or rows.shape[1] != shape[-1]:
        raise ValueError(
            f"moekernels::{'linear' if len(shape) == 2 else 'grouped_gemm'}: rows must have the in_features of weight, "
            f"{shape[-1]}, got {list(rows.shape)}"
        )
    if len(shape) == 3 and expert_offsets.shape[0] != shape[0] + 1:
        raise ValueError(
            f"moekernels::grouped_gemm: weight must be [num_experts = {expert_offsets.shape[0] - 1}, N, K], "
            f"got {list(shape)}"
        )
    rounds = layout.int8_rows and rows.is_cpu
    return call(
        torch.ops.moekernels.quantized_gemm.default,
        rows.to(dtype), layout.codes, layout.scales, layout.tables, layout.order, layout.group, layout.unit, shape[-2],
        expert_offsets, None if bias is None else bias.to(dtype) if autocast_dtype(rows.device) else bias,
        activation, gated, row_scale, token_of_row, is_batch_invariant(), rounds,
        layout.int8_threshold if rounds else 0.0,
    )  # fmt: skip


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
