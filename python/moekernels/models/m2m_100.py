"""M2M100 (arXiv 2010.11125): a dense encoder and decoder that translate between any two of a hundred languages.

Letters: B batch, S source tokens, T new target tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from moekernels.models.translation import (
    LayerContext,
    LayerOutput,
    TranslationAttention,
    TranslationConfig,
    TranslationDecoder,
    TranslationEncoder,
    TranslationForConditionalGeneration,
    TranslationModel,
    TranslationPreTrainedModel,
    clamp_float16,
)
from moekernels.nn.activations import op_activation
from moekernels.nn.linear import project


class M2M100Config(TranslationConfig):
    """The configuration of M2M100; the defaults are those of m2m100_418M."""

    model_type = "m2m_100"


class M2M100EncoderLayer(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: M2M100Config, layer: int = 0) -> None:
        super().__init__()
        self.self_attn = TranslationAttention(config, config.encoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = op_activation(config.activation_function)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        inner = project(self.fc1, self.final_layer_norm(hidden), self.activation)
        mixed = project(self.fc2, F.dropout(inner, self.activation_dropout, self.training))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return LayerOutput(clamp_float16(hidden, always=True), probs)


class M2M100DecoderLayer(nn.Module):
    """Attention to the target, attention to the source, then the MLP."""

    def __init__(self, config: M2M100Config, layer: int) -> None:
        super().__init__()
        self.self_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = TranslationAttention(config, config.decoder_attention_heads, layer, cross=True)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = op_activation(config.activation_function)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, probabilities of both attentions."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        attended, cross_probs = self.encoder_attn(self.encoder_attn_layer_norm(hidden), context)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        inner = project(self.fc1, self.final_layer_norm(hidden), self.activation)
        mixed = project(self.fc2, F.dropout(inner, self.activation_dropout, self.training))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return LayerOutput(hidden, probs, cross_attentions=cross_probs)


class M2M100PreTrainedModel(TranslationPreTrainedModel):
    config_class = M2M100Config


class M2M100Encoder(TranslationEncoder, M2M100PreTrainedModel):
    output_class: ClassVar[Any] = BaseModelOutput


class M2M100Decoder(TranslationDecoder, M2M100PreTrainedModel):
    pass


class M2M100Model(TranslationModel, M2M100PreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    headless_output_class: ClassVar[Any] = Seq2SeqModelOutput

    def __init__(self, config: M2M100Config) -> None:
        super().__init__(config)
        self.encoder = M2M100Encoder(
            config,
            self.shared,
            (M2M100EncoderLayer(config, i) for i in range(config.encoder_layers)),
        )
        self.decoder = M2M100Decoder(
            config,
            self.shared,
            (M2M100DecoderLayer(config, i) for i in range(config.decoder_layers)),
        )
        self.post_init()


class M2M100ForConditionalGeneration(TranslationForConditionalGeneration, M2M100PreTrainedModel):  # type: ignore[override]
    """Encoder and decoder with a language-modelling head, which generates translations."""

    output_class: ClassVar[Any] = Seq2SeqLMOutput

    def __init__(self, config: M2M100Config) -> None:
        super().__init__(config, M2M100Model(config))
