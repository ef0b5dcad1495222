"""The layers of encoder and decoder.

Letters: B batch, S source tokens, T target tokens, E experts, H hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.nllb_moe.config import NllbMoeConfig
from moekernels.models.nllb_moe.mlp import NllbMoeDenseActDense, NllbMoeSparseMLP
from moekernels.models.translation import LayerContext, LayerOutput, TranslationAttention, clamp_float16


class _NllbMoeLayer(nn.Module):
    """The second half of a layer, which encoder and decoder share."""

    def __init__(self, config: NllbMoeConfig, layer: int, sparse_step: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.is_sparse = sparse_step > 0 and (layer + 1) % sparse_step == 0

    def _make_feed_forward(self, config: NllbMoeConfig, ffn_dim: int) -> None:
        self.ffn = NllbMoeSparseMLP(config, ffn_dim) if self.is_sparse else NllbMoeDenseActDense(config, ffn_dim)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)

    def _feed_forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        normalised = self.ff_layer_norm(hidden)
        logits = None
        if self.is_sparse:
            mixed, logits = self.ffn(normalised, mask=kept)
        else:
            mixed = self.ffn(normalised)
        return clamp_float16(hidden + F.dropout(mixed, self.activation_dropout, self.training)), logits


class NllbMoeEncoderLayer(_NllbMoeLayer):
    """Attention, then MLP or experts, each on a normalised input and added to the residual stream."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config, layer, config.encoder_sparse_step)
        self.self_attn = TranslationAttention(config, config.encoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self._make_feed_forward(config, config.encoder_ffn_dim)

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return LayerOutput(hidden, probs, logits)


class NllbMoeDecoderLayer(_NllbMoeLayer):
    """Attention to the target, attention to the source, then MLP or experts."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config, layer, config.decoder_sparse_step)
        self.self_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = TranslationAttention(config, config.decoder_attention_heads, layer, cross=True)
        self.cross_attention_layer_norm = nn.LayerNorm(config.d_model)
        self._make_feed_forward(config, config.decoder_ffn_dim)

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B * T, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        attended, cross_probs = self.cross_attention(self.cross_attention_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return LayerOutput(hidden, probs, logits, cross_probs)
