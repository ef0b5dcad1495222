"""Shape functions: what each op returns, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moekernels.ops._expert_weights import matrix_shape

_Shape = TypeVar("_Shape", bound=Callable[..., Any])


def _fake(op: str) -> Callable[[_Shape], _Shape]:
    """Registers a shape function, which also is what torch calls for a mixture of meta and real tensors.

    That one must not get away with memory that nobody writes.
    """
    names = [argument.name for argument in getattr(torch.ops.moekernels, op).default._schema.arguments]

    def register(shape: _Shape) -> _Shape:
        def checked(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            for name, value in [*zip(names[1:], args, strict=False), *kwargs.items()]:
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and tensor.device != first.device:
                        raise ValueError(
                            f"moekernels::{op.removesuffix('_train')}: {name} must be on {first.device} "
                            f"like {names[0]}, got {tensor.device}"
                        )
            return shape(first, *args, **kwargs)

        torch.library.register_fake(f"moekernels::{op}", checked)
        return shape

    return register


@_fake("route")
def _route(logits: Tensor, top_k: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@_fake("route_by_score")
def _route_by_score(logits: Tensor, top_k: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@_fake("transpose")
def _transpose(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[1], matrix.shape[0])


@_fake("plan")
def _plan(expert_ids: Tensor, num_experts: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = expert_ids.shape
    return (
        expert_ids.new_empty(num_experts + 1),
        expert_ids.new_empty(num_tokens * top_k),
        expert_ids.new_empty(num_tokens, top_k),
    )


@_fake("permute")
def _permute(hidden: Tensor, token_of_row: Tensor, row_of_slot: Tensor | None = None) -> Tensor:
    return hidden.new_empty(token_of_row.shape[0], hidden.shape[1])


@_fake("grouped_gemm")
def _grouped_gemm(
    rows: Tensor,
    weight: list[Tensor],
    expert_offsets: Tensor,
    bias: list[Tensor],
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    transposed: bool = False,
    zero_unvisited: bool = False,
) -> Tensor:
    num_rows = rows.shape[0] if token_of_row is None else token_of_row.shape[0]
    out_features = matrix_shape(weight, expert_offsets.shape[0] - 1)[1 if transposed else 0]
    return rows.new_empty(num_rows, out_features // (2 if gated else 1))


@_fake("grouped_weight_grad")
def _grouped_weight_grad(
    grad_rows: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    grad_token_of_row: Tensor | None = None,
    token_of_row: Tensor | None = None,
    bias_scale: Tensor | None = None,
    need_bias: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    num_experts, out_features = expert_offsets.shape[0] - 1, grad_rows.shape[1]
    grad_weight = grad_rows.new_empty(num_experts, out_features, rows.shape[1])
    return grad_weight, grad_rows.new_empty((num_experts, out_features) if need_bias else 0)


@_fake("unpermute")
def _unpermute(rows: Tensor, row_of_slot: Tensor, routing_weights: Tensor | None = None) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@_fake("unpermute_grad")
def _unpermute_grad(
    grad_out: Tensor,
    rows: Tensor | None,
    row_of_slot: Tensor,
    token_of_row: Tensor,
    routing_weights: Tensor | None = None,
    with_grad_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = row_of_slot.shape
    grad_rows = grad_out.new_empty(token_of_row.shape[0] if with_grad_rows else 0, grad_out.shape[1])
    return grad_rows, grad_out.new_empty(0 if rows is None else num_tokens, top_k, dtype=torch.float32)


@_fake("sparse_mlp")
def _sparse_mlp(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


@_fake("sparse_mlp_train")
def _sparse_mlp_train(
    hidden: Tensor,
    routing_weights: Tensor,
    expert_offsets: Tensor,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    up_weight: list[Tensor],
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(
        token_of_row.shape[0], matrix_shape(up_weight, expert_offsets.shape[0] - 1)[0]
    )


@_fake("activation")
def _activation(linear: Tensor, activation: str, gated: bool) -> Tensor:
    return linear.new_empty(linear.shape[0], linear.shape[1] // (2 if gated else 1))


@_fake("linear")
def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    batch_invariant: bool = False,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@_fake("quantized_gemm")
def _quantized_gemm(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    tables: list[Tensor],
    order: str,
    group: int,
    unit: float,
    out_features: int,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    batch_invariant: bool = False,
    int8_rows: bool = False,
    int8_threshold: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    num_rows = (rows if token_of_row is None else token_of_row).shape[0]
    return rows.new_empty(num_rows, out_features // 2 if gated else out_features)


@_fake("rms_norm")
def _rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return input.new_empty(input.shape)


@_fake("attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    batch_size, num_heads, num_queries, head_dim = query.shape
    return query.new_empty(batch_size, num_queries, num_heads * head_dim)


@_fake("activation_grad")
def _activation_grad(
    grad_out: Tensor,
    linear: Tensor,
    activation: str,
    gated: bool,
    row_scale: Tensor | None = None,
    expert_offsets: Tensor | None = None,
    with_scaled: bool = True,
    with_grad_scale: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = grad_out.shape
    return (
        linear.new_empty(linear.shape),
        linear.new_empty(num_rows if with_scaled else 0, width),
        linear.new_empty(num_rows if with_grad_scale else 0, dtype=torch.float32),
    )


@_fake("route_grad")
def _route_grad(grad_weights: Tensor, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake("router_stats")
def _router_stats(
    logits: Tensor, num_groups: int, top_k: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    def floats(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    num_experts = logits.shape[1]
    return floats(num_groups, num_experts), floats(num_groups, num_experts), floats(num_groups)


@_fake("router_stats_grad")
def _router_stats_grad(
    grad_prob_sums: Tensor, grad_z_sums: Tensor, logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    return logits.new_empty(logits.shape)
