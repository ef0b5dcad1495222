"""Attention over cached keys: masks, and the functions that models choose from by name.

Every attention function has one signature, so that a model calls whichever its configuration names::

    attend(query [B, H, Q, D], key [B, H_kv, S, D], value [B, H_kv, S, D], mask, scale=..., dropout=...)
        -> (output [B, Q, H * D], probabilities [B, H, Q, S] or None)

H_kv divides H (grouped-query attention, arXiv 2305.13245), and keys are never repeated to H heads. A mask is built once
per forward pass and shared by all layers; its additive form may also carry a position bias per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.nn.cache import Cache


class AttentionMask(NamedTuple):
    """What a query may see.

    Attributes:
        bias: added to the scores, broadcastable to ``[B, H, Q, S]``; None hides nothing.
        is_causal: hide the keys after the query's own position; Q equals S then, and bias is None.
    """

    bias: Tensor | None = None
    is_causal: bool = False


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, and elsewhere the lowest finite number, so that even a row that sees nothing stays finite."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that has its final shape, and is boolean (True: visible) or additive already."""
    return additive_mask(mask, dtype) if mask.dtype == torch.bool else mask.to(dtype)


def _hides_nothing(attention_mask: Tensor) -> bool:
    # Reading a mask on an accelerator would wait for it, and a tracer cannot read at all.
    on_host = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and bool(attention_mask.all())


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> AttentionMask:
    """The mask of an encoder, or of cross attention to one: every query sees every key that is not padding.

    Args:
        attention_mask: ``[B, S]``, 0 at padding; or ``[B, 1, Q, S]``, additive or boolean; or None.
        dtype: of the scores.
    """
    if attention_mask is None:
        return AttentionMask()
    if attention_mask.dim() == 4:
        return AttentionMask(_additive(attention_mask, dtype))
    if _hides_nothing(attention_mask):
        return AttentionMask()
    return AttentionMask(additive_mask(attention_mask.bool()[:, None, None, :], dtype))


def causal_mask(
    attention_mask: Tensor | None,
    cache: Cache | None,
    cache_position: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    *,
    explicit: bool = False,
) -> AttentionMask:
    """The mask of a decoder: a query sees the keys up to its own position that are not padding.

    Args:
        attention_mask: ``[B, S]``, 0 at padding, over past and new tokens; or ``[B, 1, Q, S]``, additive or boolean;
            or None.
        cache: the cache the keys come from, before the new tokens are appended.
        cache_position: ``[Q]``, the positions of the new tokens.
        batch_size: B.
        dtype: of the scores.
        explicit: spell the triangle out, for a function that does not know `is_causal`.

    Raises:
        ValueError: `attention_mask` does not cover the tokens.
    """
    num_queries = cache_position.shape[0]
    num_keys = num_queries if cache is None else cache.key_length(num_queries)
    # A cache of fixed size also returns places that are not filled yet.
    filled = cache is None or not cache.fixed_size

    if attention_mask is not None:
        num_masked = attention_mask.shape[-1]
        is_final = attention_mask.dim() == 4
        fits = num_masked == num_keys if filled or is_final else num_masked <= num_keys
        if attention_mask.dim() not in (2, 4) or attention_mask.shape[0] not in (1, batch_size) or not fits:
            raise ValueError(
                f"attention_mask must be [{batch_size}, {num_keys}] (past and new tokens) or "
                f"[{batch_size}, 1, {num_queries}, {num_keys}], got {list(attention_mask.shape)}"
            )
        if is_final:
            return AttentionMask(_additive(attention_mask, dtype))
        if _hides_nothing(attention_mask):
            attention_mask = None
        elif num_masked < num_keys:
            attention_mask = F.pad(attention_mask, (0, num_keys - num_masked))

    if filled and num_queries == 1:
        return padding_mask(attention_mask, dtype)
    if filled and attention_mask is None and num_queries == num_keys and not explicit:
        return AttentionMask(is_causal=True)
    visible = (torch.arange(num_keys, device=cache_position.device) <= cache_position[:, None])[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    return AttentionMask(additive_mask(visible, dtype))


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention spelled out in matrix products, which also returns the probabilities. Softmax in float32."""
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_groups, num_keys = key.shape[1:3]
    # The heads that share a key are more rows of queries to it.
    num_rows = num_heads // num_groups * num_queries
    rows = query.reshape(batch_size, num_groups, num_rows, head_dim)
    scores = (torch.matmul(rows, key.transpose(2, 3)) * scale).view(batch_size, num_heads, num_queries, num_keys)
    if mask.is_causal:
        visible = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).tril()
        scores = scores + additive_mask(visible, scores.dtype)
    elif mask.bias is not None:
        # In float32 a low score under the lowest float16 does not overflow to -inf.
        scores = scores.float() + mask.bias if scores.dtype == torch.float16 else scores + mask.bias
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    probs = torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    if dropout:
        probs = F.dropout(probs, p=dropout)
    out = torch.matmul(probs.view(batch_size, num_groups, num_rows, num_keys), value)
    out = out.view(batch_size, num_heads, num_queries, head_dim).transpose(1, 2)
    return out.reshape(batch_size, num_queries, num_heads * head_dim), probs


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Attention by PyTorch's fused kernels. Returns no probabilities."""
    batch_size, num_heads, num_queries, head_dim = query.shape
    if num_queries == 1 and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16):
        # A single query makes the fused CPU kernel slow in half precision (up to 5 times, torch 2.13).
        return eager_attention(query, key, value, mask, scale=scale, dropout=dropout)[0], None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.bias,
        dropout_p=dropout,
        is_causal=mask.is_causal,
        scale=scale,
        enable_gqa=key.shape[1] != num_heads,
    )
    return out.transpose(1, 2).reshape(batch_size, num_queries, num_heads * head_dim), None


ATTENTION_FUNCTIONS: dict[str, AttentionFunction] = {"eager": eager_attention, "sdpa": sdpa_attention}
