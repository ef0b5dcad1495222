"""Attention, and the blocks of encoder and decoder.

Letters: B batch, S source tokens, T target tokens, E experts, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.encoder_decoder import EncoderDecoderAttention, LayerContext, clamp_float16
from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.models.switch_transformers.mlp import SwitchTransformersDenseActDense, SwitchTransformersSparseMLP
from moekernels.nn import Linear, RMSNorm
from moekernels.nn.positions import relative_position_buckets


class SwitchTransformersAttention(EncoderDecoderAttention):
    """Attention without biases and without a scale, which the initialisation of the queries makes up for.

    Args:
        config: of the model.
        layer: the decoder layer it is part of.
        has_relative_attention_bias: whether it holds the position bias of all layers of its stack.
    """

    def __init__(
        self, config: SwitchTransformersConfig, layer: int = 0, *, has_relative_attention_bias: bool = False
    ) -> None:
        super().__init__(config.num_heads, config.d_kv, scale=1.0, dropout=config.dropout_rate, layer=layer)
        inner_size = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner_size, bias=False)
        self.k = Linear(config.d_model, inner_size, bias=False)
        self.v = Linear(config.d_model, inner_size, bias=False)
        self.o = Linear(inner_size, config.d_model, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads)

    def position_bias(self, positions: Tensor, num_keys: int, *, bidirectional: bool) -> Tensor:
        """What is added to the scores ``[1, heads, T, num_keys]`` of queries at `positions` ``[T]``."""
        distance = torch.arange(num_keys, device=positions.device) - positions[:, None]
        buckets = relative_position_buckets(
            distance, bidirectional=bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        # This block may be on another device than the rest of the stack.
        bias = self.relative_attention_bias(buckets.to(self.relative_attention_bias.weight.device))
        # Read in every layer, where a kernel wants the keys side by side.
        return bias.permute(2, 0, 1)[None].to(positions.device).contiguous()

    def project_query(self, hidden: Tensor) -> Tensor:
        return self.q(hidden)

    def project_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(hidden), self.v(hidden)

    def project_output(self, attended: Tensor) -> Tensor:
        return self.o(attended)


class _SwitchTransformersLayer(nn.Module):
    """A part of a block: what it adds is computed from a normalised input."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = config.dropout_rate

    def _add(self, hidden: Tensor, added: Tensor) -> Tensor:
        return clamp_float16(hidden + F.dropout(added, self.dropout, self.training))


class SwitchTransformersLayerSelfAttention(_SwitchTransformersLayer):
    """Attention to the tokens themselves."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__(config)
        self.SelfAttention = SwitchTransformersAttention(config, layer, has_relative_attention_bias=layer == 0)

    def forward(self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]`` and probabilities."""
        attended, probs = self.SelfAttention(self.layer_norm(hidden), context, head_mask)
        return self._add(hidden, attended), probs


class SwitchTransformersLayerCrossAttention(_SwitchTransformersLayer):
    """Attention to the source, which has no position bias."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__(config)
        self.EncDecAttention = SwitchTransformersAttention(config, layer)

    def forward(
        self, hidden: Tensor, source: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]``, ``source [B, S, H]`` -> output ``[B, T, H]`` and probabilities."""
        attended, probs = self.EncDecAttention(self.layer_norm(hidden), context, head_mask, source)
        return self._add(hidden, attended), probs


class SwitchTransformersLayerFF(_SwitchTransformersLayer):
    """MLP or experts."""

    def __init__(self, config: SwitchTransformersConfig, is_sparse: bool) -> None:
        super().__init__(config)
        self.mlp = SwitchTransformersSparseMLP(config) if is_sparse else SwitchTransformersDenseActDense(config)

    def forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, and router logits ``[B, T, E]`` if there are experts."""
        normalised = self.layer_norm(hidden)
        logits = None
        if isinstance(self.mlp, SwitchTransformersSparseMLP):
            mixed, logits = self.mlp(normalised, kept)
        else:
            mixed = self.mlp(normalised)
        return self._add(hidden, mixed), logits


class SwitchTransformersEncoderBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__()
        is_sparse = _is_sparse(layer, config.encoder_sparse_step)
        self.layer = nn.ModuleList(
            [SwitchTransformersLayerSelfAttention(config, layer), SwitchTransformersLayerFF(config, is_sparse)]
        )

    def forward(
        self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, probabilities, router logits ``[B, S, E]``."""
        attention, feed_forward = self.layer
        hidden, probs = attention(hidden, context, head_mask)
        hidden, logits = feed_forward(hidden, context.kept)
        return hidden, probs, logits


class SwitchTransformersDecoderBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__()
        is_sparse = _is_sparse(layer, config.decoder_sparse_step)
        self.layer = nn.ModuleList(
            [
                SwitchTransformersLayerSelfAttention(config, layer),
                SwitchTransformersLayerCrossAttention(config, layer),
                SwitchTransformersLayerFF(config, is_sparse),
            ]
        )

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        context: LayerContext,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B, T, E]``."""
        attention, cross_attention, feed_forward = self.layer
        hidden, probs = attention(hidden, context, head_mask)
        hidden, cross_probs = cross_attention(hidden, source, context, cross_head_mask)
        hidden, logits = feed_forward(hidden, context.kept)
        return hidden, probs, cross_probs, logits


def _is_sparse(layer: int, step: int) -> bool:
    return step == 1 or (step > 1 and layer % step == 1)
