"""The layers of encoder and decoder.

Letters: B batch, S source tokens, T target tokens, E experts, H hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.nllb_moe.config import NllbMoeConfig
from moekernels.models.nllb_moe.mlp import NllbMoeDenseActDense, NllbMoeSparseMLP
from moekernels.models.translation import LayerContext, TranslationAttention, clamp_float16


class _NllbMoeLayer(nn.Module):
    """The second half of a layer, which encoder and decoder share."""

    ffn: nn.Module
    ff_layer_norm: nn.LayerNorm

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def _feed_forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        normalised = self.ff_layer_norm(hidden)
        logits = None
        if isinstance(self.ffn, NllbMoeSparseMLP):
            mixed, logits = self.ffn.mix(normalised, kept)
        else:
            mixed = self.ffn(normalised)
        return clamp_float16(hidden + F.dropout(mixed, self.activation_dropout, self.training)), logits


class NllbMoeEncoderLayer(_NllbMoeLayer):
    """Attention, then MLP or experts, each on a normalised input and added to the residual stream."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config)
        self.self_attn = TranslationAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, config.encoder_ffn_dim, layer, config.encoder_sparse_step)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return hidden, probs, logits


class NllbMoeDecoderLayer(_NllbMoeLayer):
    """Attention to the target, attention to the source, then MLP or experts."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config)
        self.self_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.cross_attention_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, config.decoder_ffn_dim, layer, config.decoder_sparse_step)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        context: LayerContext,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B * T, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        normalised = self.cross_attention_layer_norm(hidden)
        attended, cross_probs = self.cross_attention(normalised, context, cross_head_mask, source)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return hidden, probs, cross_probs, logits


def _feed_forward(config: NllbMoeConfig, ffn_dim: int, layer: int, sparse_step: int) -> nn.Module:
    is_sparse = sparse_step > 0 and (layer + 1) % sparse_step == 0
    return NllbMoeSparseMLP(config, ffn_dim) if is_sparse else NllbMoeDenseActDense(config, ffn_dim)
