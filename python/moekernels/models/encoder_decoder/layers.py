"""Parts of a layer: attention, and what keeps float16 finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moekernels.models.context import LayerContext
from moekernels.nn import ATTENTION_FUNCTIONS


class EncoderDecoderAttention(nn.Module):
    """Attention to the tokens themselves, or to the encoder's output. A subclass has the projections.

    Args:
        num_heads: number of heads.
        head_dim: D, their width.
        scale: factor of the scores.
        dropout: of the probabilities, in training.
        layer: the layer it is part of.
        cross: attend to the source.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, scale: float, dropout: float, layer: int, cross: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self.cross = cross
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = dropout

    def project_query(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` -> ``[B, T, heads * D]``."""
        raise NotImplementedError

    def project_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, H]`` -> keys and values ``[B, S, heads * D]``."""
        raise NotImplementedError

    def project_output(self, attended: Tensor) -> Tensor:
        """``[B, T, heads * D]`` -> ``[B, T, H]``."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None]:
        """Attend to `hidden` ``[B, T, H]`` itself and what is cached, or to the source.

        Returns:
            Output ``[B, T, H]``, and probabilities ``[B, heads, T, keys]`` if the implementation has them.
        """
        query = self._heads(self.project_query(hidden))
        cache: Any = context.cache
        if self.cross:
            mask, head_mask = context.cross_mask, context.cross_head_mask
            stored = None if cache is None else cache.cross(self.layer)
            key, value = self._keys(context.source) if stored is None else stored
            if cache is not None and stored is None:
                # Read in every step to come, and several times as fast when a head's keys lie together.
                key, value = key.contiguous(), value.contiguous()
                cache.store_cross(key, value, self.layer)
        else:
            mask, head_mask = context.mask, context.head_mask
            key, value = self._keys(hidden)
            if cache is not None:
                key, value = cache.update(key, value, self.layer, context.cache_position)
        dropout = self.dropout if self.training else 0.0
        attend = ATTENTION_FUNCTIONS[context.implementation]
        out, probs = attend(query, key, value, mask, scale=self.scale, dropout=dropout)
        if head_mask is not None:
            factors = head_mask[self.layer, :, None]
            out = (out.unflatten(-1, (self.num_heads, -1)) * factors.to(out.dtype)).flatten(-2)
            probs = None if probs is None else probs * factors[:, None].to(probs.dtype)
        return self.project_output(out), probs

    def _keys(self, hidden: Any) -> tuple[Tensor, Tensor]:
        key, value = self.project_keys(hidden)
        return self._heads(key), self._heads(value)

    def _heads(self, projected: Tensor) -> Tensor:
        """``[B, T, heads * D]`` -> ``[B, heads, T, D]``."""
        batch_size, num_tokens, _ = projected.shape
        return projected.view(batch_size, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)


def clamp_float16(hidden: Tensor, *, always: bool = False) -> Tensor:
    """Bring what has overflowed in float16 back into its range; `always` clips whether anything has or not."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(hidden.dtype).max - 1000
    if always:
        return hidden.clamp(-limit, limit)
    # Decided on the device: the host would have to wait.
    bound = torch.where(hidden.isfinite().all(), math.inf, limit).to(hidden.dtype)
    return hidden.clamp(-bound, bound)
