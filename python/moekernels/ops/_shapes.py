"""Shape functions: what each op returns, without computing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("moekernels::route")
def _route(logits: Tensor, top_k: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("moekernels::plan")
def _plan(expert_ids: Tensor, num_experts: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = expert_ids.shape
    return (
        expert_ids.new_empty(num_experts + 1),
        expert_ids.new_empty(num_tokens * top_k),
        expert_ids.new_empty(num_tokens, top_k),
    )


@torch.library.register_fake("moekernels::permute")
def _permute(hidden: Tensor, token_of_row: Tensor, row_of_slot: Tensor | None = None) -> Tensor:
    return hidden.new_empty(token_of_row.shape[0], hidden.shape[1])


@torch.library.register_fake("moekernels::grouped_gemm")
def _grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    row_scale: Tensor | None = None,
    token_of_row: Tensor | None = None,
    allow_tf32: bool = False,
    batch_invariant: bool = False,
    transposed: bool = False,
) -> Tensor:
    num_rows = rows.shape[0] if token_of_row is None else token_of_row.shape[0]
    return rows.new_empty(num_rows, weight.shape[2 if transposed else 1] // (2 if gated else 1))


@torch.library.register_fake("moekernels::grouped_weight_grad")
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


@torch.library.register_fake("moekernels::unpermute")
def _unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None = None) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@torch.library.register_fake("moekernels::unpermute_grad")
def _unpermute_grad(
    grad_out: Tensor,
    rows: Tensor | None,
    row_of_slot: Tensor,
    token_of_row: Tensor,
    weights: Tensor | None = None,
    with_grad_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = row_of_slot.shape
    grad_rows = grad_out.new_empty(token_of_row.shape[0] if with_grad_rows else 0, grad_out.shape[1])
    return grad_rows, grad_out.new_empty(0 if rows is None else num_tokens, top_k, dtype=torch.float32)


@torch.library.register_fake("moekernels::sparse_mlp")
def _sparse_mlp(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("moekernels::sparse_mlp_train")
def _sparse_mlp_train(
    hidden: Tensor,
    expert_weights: Tensor,
    expert_offsets: Tensor,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    up_weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(token_of_row.shape[0], up_weight.shape[1])


@torch.library.register_fake("moekernels::activation")
def _activation(linear: Tensor, activation: str, gated: bool) -> Tensor:
    return linear.new_empty(linear.shape[0], linear.shape[1] // (2 if gated else 1))


@torch.library.register_fake("moekernels::linear")
def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    batch_invariant: bool = False,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("moekernels::rms_norm")
def _rms_norm(input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return input.new_empty(input.shape)


@torch.library.register_fake("moekernels::attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    batch_size, num_heads, num_queries, head_dim = query.shape
    return query.new_empty(batch_size, num_queries, num_heads * head_dim)


@torch.library.register_fake("moekernels::activation_grad")
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


@torch.library.register_fake("moekernels::route_grad")
def _route_grad(grad_weights: Tensor, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("moekernels::router_stats")
def _router_stats(
    logits: Tensor, num_groups: int, top_k: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    def floats(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    num_experts = logits.shape[1]
    return floats(num_groups, num_experts), floats(num_groups, num_experts), floats(num_groups)


@torch.library.register_fake("moekernels::router_stats_grad")
def _router_stats_grad(
    grad_prob_sums: Tensor, grad_z_sums: Tensor, logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    return logits.new_empty(logits.shape)
