"""Attention over cached keys: masks, and the functions that models choose from by name.

Every attention function has one signature, so that a model calls whichever its configuration names::

    attend(query [B, H, Q, D], key [B, H_kv, S, D], value [B, H_kv, S, D], mask, scale=..., dropout=...)
        -> (output [B, Q, H * D], probabilities [B, H, Q, S] or None)

H_kv divides H (grouped-query attention, arXiv 2305.13245), and keys are never repeated to H heads. Likewise the batch
of the keys may divide that of the queries: then as many consecutive rows of queries as it takes look at one row of
keys, as the beams of a sentence look at its encoding. A mask is built once per forward pass and shared by all layers;
its additive form may also carry a position bias per head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels._settings import current_cpu_isa
from moekernels.nn.cache import Cache
from moekernels.ops._call import runs_on_cpu_kernels
from moekernels.ops.attention import attention_by_kernel


class AttentionMask(NamedTuple):
    """What a query may see.

    Attributes:
        bias: added to the scores, broadcastable to ``[B, H, Q, S]``; None hides nothing.
        is_causal: hide the keys after the query's own position, the last query being at the last key; bias is None
            then. Unless the mask is deferred, Q equals S.
        padding: ``[B, S]`` bool, False at keys that are padding; only in a deferred mask, instead of a bias.
        window: how many keys a query sees, its own position being the last; only in a deferred mask.
    """

    bias: Tensor | None = None
    is_causal: bool = False
    padding: Tensor | None = None
    window: int | None = None


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

# Up to so many that look at the same keys, this package's CPU kernel is faster than torch's fused one (torch 2.13, Xeon
# with AMX: 1.1 to 4 times).
_FEW_QUERIES = 8
# By tile registers, in bfloat16, so are more queries, up to so many keys of so wide heads (the same machine; both warm:
# 32 keys 1.8 to 2.2 times, 256 1.4 times, 512 of width 128 1.06 times).
_MOST_KEYS_BY_TILES = 512
_WIDEST_HEAD_BY_TILES = 256

#: The name of the one function that wants its mask deferred, and a package of its own.
FLASH_ATTENTION = "flash_attention_2"


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


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype, *, deferred: bool = False) -> AttentionMask:
    """The mask of an encoder, or of cross attention to one: every query sees every key that is not padding.

    Args:
        attention_mask: ``[B, S]``, 0 at padding; or ``[B, 1, Q, S]``, additive or boolean; or None.
        dtype: of the scores.
        deferred: leave the padding as it is, for a function that takes no bias (flash attention).
    """
    if attention_mask is None:
        return AttentionMask()
    if attention_mask.dim() == 4:
        return AttentionMask(_additive(attention_mask, dtype))
    if _hides_nothing(attention_mask):
        return AttentionMask()
    if deferred:
        return AttentionMask(padding=attention_mask.bool())
    return AttentionMask(additive_mask(attention_mask.bool()[:, None, None, :], dtype))


def causal_mask(
    attention_mask: Tensor | None,
    cache: Cache | None,
    cache_position: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    *,
    sliding_window: int | None = None,
    explicit: bool = False,
    deferred: bool = False,
) -> AttentionMask:
    """The mask of a decoder: a query sees the keys up to its own position that are not padding.

    Args:
        attention_mask: ``[B, S]``, 0 at padding, over past and new tokens; or ``[B, 1, Q, S]``, additive or boolean;
            or None.
        cache: the cache the keys come from, before the new tokens are appended.
        cache_position: ``[Q]``, the positions of the new tokens.
        batch_size: B.
        dtype: of the scores.
        sliding_window: how many keys up to its own a query sees at most; None for all of them.
        explicit: spell the triangle out, for a function that does not know `is_causal`.
        deferred: leave triangle and padding as they are, for a function that takes no bias (flash attention).

    Raises:
        ValueError: `attention_mask` does not cover the tokens.
    """
    num_queries = cache_position.shape[0]
    num_keys = num_queries if cache is None else cache.key_length(num_queries)
    # A cache of fixed size also returns places that are not filled yet.
    filled = cache is None or not cache.fixed_size
    # A window over all keys hides none.
    window = None if sliding_window is None or sliding_window >= num_keys else sliding_window

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

    if filled and num_queries == 1 and window is None:
        return padding_mask(attention_mask, dtype, deferred=deferred)
    if filled and deferred:
        padding = None if attention_mask is None else attention_mask.bool()
        return AttentionMask(is_causal=True, padding=padding, window=window)
    if filled and attention_mask is None and window is None and num_queries == num_keys and not explicit:
        return AttentionMask(is_causal=True)
    places, own = torch.arange(num_keys, device=cache_position.device), cache_position[:, None]
    visible = places <= own
    if window is not None:
        visible = visible & (places > own - window)
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    return AttentionMask(additive_mask(visible, dtype))


def _sharing_keys(attend: AttentionFunction) -> AttentionFunction:
    """Makes rows that share their keys more queries of one row, so that every key is read once for all of them."""

    @wraps(attend)
    def call(
        query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if query.shape[0] == key.shape[0]:
            return attend(query, key, value, mask, **options)
        num_rows, num_heads, num_queries, head_dim = query.shape
        batch_size, _, num_keys, _ = key.shape
        if num_rows % batch_size or mask.is_causal:
            kind = "causally " if mask.is_causal else ""
            raise ValueError(f"attention: {num_rows} rows of queries cannot {kind}share {batch_size} rows of keys")
        shared = num_rows // batch_size
        if mask.bias is not None:
            mask = mask._replace(bias=_fold_rows(mask.bias, batch_size, shared, num_queries))
        out, probs = attend(_fold_rows(query, batch_size, shared, num_queries), key, value, mask, **options)
        if probs is not None:
            probs = probs.view(batch_size, num_heads, shared, num_queries, num_keys).transpose(1, 2)
            probs = probs.reshape(num_rows, num_heads, num_queries, num_keys)
        return out.view(num_rows, num_queries, num_heads * head_dim), probs

    return call


def _fold_rows(tensor: Tensor, batch_size: int, shared: int, num_queries: int) -> Tensor:
    """``[B * n, H, Q, D]``, or what is broadcast to it, as ``[B, H, n * Q, D]``."""
    rows, heads, queries, width = tensor.shape
    if rows <= batch_size and queries == 1:
        return tensor
    split = tensor.view(batch_size, -1, heads, queries, width) if rows > 1 else tensor[None]
    split = split.transpose(1, 2).expand(-1, -1, shared, num_queries, -1)
    return split.reshape(split.shape[0], heads, shared * num_queries, width)


@_sharing_keys
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
    """Attention by fused kernels: PyTorch's, or :func:`moekernels.ops.attention`. Returns no probabilities."""
    bias = mask.bias
    # The numbers come last: a tracer would make them conditions of the graph.
    if (
        not dropout
        and not mask.is_causal
        and (runs_on_cpu_kernels(query, key, value) if bias is None else runs_on_cpu_kernels(query, key, value, bias))
        and key.shape[0]
        and query.shape[0] % key.shape[0] == 0
        and (query.shape[2] * query.shape[0] <= _FEW_QUERIES * key.shape[0] or _is_fast_by_tiles(query, key))
    ):
        return attention_by_kernel(query, key, value, scale, bias), None
    return _torch_attention(query, key, value, mask, scale=scale, dropout=dropout)


def _is_fast_by_tiles(query: Tensor, key: Tensor) -> bool:
    return (
        query.dtype == torch.bfloat16
        and current_cpu_isa() == "amx"
        and query.shape[2] > _FEW_QUERIES
        and query.shape[3] <= _WIDEST_HEAD_BY_TILES
        and key.shape[2] <= _MOST_KEYS_BY_TILES
    )


@_sharing_keys
def _torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    batch_size, num_heads, num_queries, head_dim = query.shape
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


@_sharing_keys
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attention by the flash-attn package (arXiv 2307.08691), with a deferred mask. Returns no probabilities.

    Raises:
        ImportError: the package is not installed.
        ValueError: the mask has a bias, or the dtype is neither float16 nor bfloat16.
    """
    flash_attn = require_flash_attention()
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash_attention_2 computes in float16 and bfloat16 only, got {query.dtype}")
    if mask.bias is not None:
        raise ValueError(
            "flash_attention_2 takes padding of [batch, length] and a growing cache only: a four-dimensional mask, a "
            'position bias or a cache of fixed size needs attn_implementation="sdpa"'
        )
    batch_size, num_heads, num_queries, head_dim = query.shape
    # The package wants [B, S, heads, D].
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scale, "causal": mask.is_causal}
    if mask.window is not None:
        options["window_size"] = (mask.window - 1, 0)
    if mask.padding is None:
        out = flash_attn.flash_attn_func(query, key, value, **options)
        return out.reshape(batch_size, num_queries, num_heads * head_dim), None

    # Sequences without their padding, one behind the other. Causal queries are the last keys, and padded like them.
    kept_keys = mask.padding
    kept_queries = kept_keys[:, -num_queries:] if mask.is_causal else kept_keys.new_ones(batch_size, num_queries)
    packed = flash_attn.flash_attn_varlen_func(
        query[kept_queries],
        key[kept_keys],
        value[kept_keys],
        cu_seqlens_q=_starts(kept_queries),
        cu_seqlens_k=_starts(kept_keys),
        max_seqlen_q=num_queries,
        max_seqlen_k=key.shape[1],
        **options,
    )
    out = query.new_zeros(batch_size, num_queries, num_heads, head_dim)
    out[kept_queries] = packed
    return out.view(batch_size, num_queries, num_heads * head_dim), None


def _starts(kept: Tensor) -> Tensor:
    """Where every sequence begins once only the entries `kept` ``[B, S]`` are left: int32 ``[B + 1]``."""
    return F.pad(kept.sum(dim=1).cumsum(0), (1, 0)).int()


def require_flash_attention() -> Any:
    """The flash-attn package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("flash_attn")
    except ImportError as error:
        raise ImportError(
            'attn_implementation="flash_attention_2" needs the flash-attn package and a CUDA device: '
            '`pip install flash-attn --no-build-isolation`. The default, "sdpa", uses PyTorch\'s own flash attention '
            "where it can"
        ) from error


ATTENTION_FUNCTIONS: dict[str, AttentionFunction] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    FLASH_ATTENTION: flash_attention,
}
