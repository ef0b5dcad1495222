"""Attention, and the blocks of encoder and decoder.

Letters: B batch, S source tokens, T target tokens, E experts, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.encoder_decoder import EncoderDecoderAttention, LayerContext, LayerOutput, clamp_float16
from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.models.switch_transformers.mlp import SwitchTransformersDenseActDense, SwitchTransformersSparseMLP
from moekernels.nn import AttentionMask, RMSNorm
from moekernels.nn.linear import project
from moekernels.nn.positions import relative_position_buckets


class SwitchTransformersAttention(EncoderDecoderAttention):
    """Attention without biases and without a scale, which the initialisation of the queries makes up for.

    Args:
        config: of the model.
        layer: the layer it is part of.
        cross: attend to the source.
        has_relative_attention_bias: whether it holds the position bias of all layers of its stack.
        bidirectional: whether keys after the query have positions of their own, as in an encoder.
    """

    def __init__(
        self,
        config: SwitchTransformersConfig,
        layer: int = 0,
        *,
        cross: bool = False,
        has_relative_attention_bias: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__(
            config.num_heads, config.d_kv, scale=1.0, dropout=config.dropout_rate, layer=layer, cross=cross
        )
        inner_size = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner_size, bias=False)
        self.k = nn.Linear(config.d_model, inner_size, bias=False)
        self.v = nn.Linear(config.d_model, inner_size, bias=False)
        self.o = nn.Linear(inner_size, config.d_model, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.bidirectional = bidirectional
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads)

    def position_bias(self, positions: Tensor, num_keys: int) -> Tensor:
        """What is added to the scores ``[1, heads, T, num_keys]`` of queries at `positions` ``[T]``."""
        distance = torch.arange(num_keys, device=positions.device) - positions[:, None]
        buckets = relative_position_buckets(
            distance, bidirectional=self.bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        # Read in every layer, where a kernel wants the keys side by side.
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None].contiguous()

    def forward(  # type: ignore[override]
        self, hidden: Tensor, context: LayerContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As :class:`EncoderDecoderAttention`; third, the bias that this and all later layers of the stack add to their
        scores, with the mask in it, if this is the attention that holds it."""
        bias = None
        if self.has_relative_attention_bias:
            num_tokens, cache, positions = hidden.shape[1], context.cache, context.cache_position
            if positions is None:
                positions = torch.arange(num_tokens, device=hidden.device)
            bias = self.position_bias(positions, num_tokens if cache is None else cache.key_length(num_tokens))
            if context.mask.bias is not None:
                # Below the lowest finite number lies -inf, and a row of that has no softmax.
                bias = (bias + context.mask.bias).clamp(min=torch.finfo(bias.dtype).min)
            context = context._replace(mask=AttentionMask(bias))
        return *super().forward(hidden, context), bias

    def project_query(self, hidden: Tensor) -> Tensor:
        return project(self.q, hidden)

    def project_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return project(self.k, hidden), project(self.v, hidden)

    def project_output(self, attended: Tensor) -> Tensor:
        return project(self.o, attended)


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

    def __init__(self, config: SwitchTransformersConfig, layer: int, *, bidirectional: bool) -> None:
        super().__init__(config)
        self.SelfAttention = SwitchTransformersAttention(
            config, layer, has_relative_attention_bias=layer == 0, bidirectional=bidirectional
        )

    def forward(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, probabilities, and the bias for later layers or None."""
        attended, probs, bias = self.SelfAttention(self.layer_norm(hidden), context)
        return self._add(hidden, attended), probs, bias


class SwitchTransformersLayerCrossAttention(_SwitchTransformersLayer):
    """Attention to the source, which has no position bias."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__(config)
        self.EncDecAttention = SwitchTransformersAttention(config, layer, cross=True)

    def forward(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]`` and probabilities."""
        attended, probs, _ = self.EncDecAttention(self.layer_norm(hidden), context)
        return self._add(hidden, attended), probs


class SwitchTransformersLayerFF(_SwitchTransformersLayer):
    """MLP or experts."""

    def __init__(self, config: SwitchTransformersConfig, is_sparse: bool) -> None:
        super().__init__(config)
        self.is_sparse = is_sparse
        self.mlp = SwitchTransformersSparseMLP(config) if is_sparse else SwitchTransformersDenseActDense(config)

    def forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, and router logits ``[B, T, E]`` if there are experts."""
        normalised = self.layer_norm(hidden)
        logits = None
        if self.is_sparse:
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
            [
                SwitchTransformersLayerSelfAttention(config, layer, bidirectional=True),
                SwitchTransformersLayerFF(config, is_sparse),
            ]
        )

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, S, H]`` -> output, probabilities, router logits ``[B, S, E]``, the bias for later layers."""
        attention, feed_forward = self.layer
        hidden, probs, bias = attention(hidden, context)
        hidden, logits = feed_forward(hidden, context.kept)
        return LayerOutput(hidden, probs, logits, position_bias=bias)


class SwitchTransformersDecoderBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__()
        is_sparse = _is_sparse(layer, config.decoder_sparse_step)
        self.layer = nn.ModuleList(
            [
                SwitchTransformersLayerSelfAttention(config, layer, bidirectional=False),
                SwitchTransformersLayerCrossAttention(config, layer),
                SwitchTransformersLayerFF(config, is_sparse),
            ]
        )

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B, T, E]``, the bias for
        later layers."""
        attention, cross_attention, feed_forward = self.layer
        hidden, probs, bias = attention(hidden, context)
        hidden, cross_probs = cross_attention(hidden, context)
        hidden, logits = feed_forward(hidden, context.kept)
        return LayerOutput(hidden, probs, logits, cross_probs, bias)


def _is_sparse(layer: int, step: int) -> bool:
    return step == 1 or (step > 1 and layer % step == 1)
