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
    TranslationAttention,
    TranslationConfig,
    TranslationDecoder,
    TranslationEncoder,
    TranslationForConditionalGeneration,
    TranslationModel,
    TranslationPreTrainedModel,
    clamp_float16,
)
from moekernels.nn import Linear
from moekernels.nn.activations import activation_function
from moekernels.nn.linear import activated


class M2M100Config(TranslationConfig):
    """The configuration of M2M100; the defaults are those of m2m100_418M.

    Args:
        vocab_size: number of tokens.
        max_position_embeddings: the longest sequence the model is made for; longer ones work too.
        encoder_layers, decoder_layers: number of layers.
        encoder_ffn_dim, decoder_ffn_dim: inner width of the MLPs.
        encoder_attention_heads, decoder_attention_heads: heads of the attentions.
        encoder_layerdrop, decoder_layerdrop: probability of leaving a layer out in training.
        use_cache: return keys and values for decoding unless told otherwise.
        is_encoder_decoder: True.
        activation_function: of the MLPs.
        d_model: H, the width of a token.
        dropout: dropout of embeddings, and of what attention and MLP add.
        attention_dropout: dropout of attention probabilities.
        activation_dropout: dropout within the MLPs.
        init_std: standard deviation of new weights.
        decoder_start_token_id: what the decoder begins with.
        scale_embedding: multiply embeddings by the square root of H.
        pad_token_id, bos_token_id, eos_token_id: special tokens; positions begin after `pad_token_id`.
        **kwargs: the fields of :class:`moekernels.models.PretrainedConfig`; others are kept.
    """

    model_type = "m2m_100"


class M2M100EncoderLayer(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: M2M100Config) -> None:
        super().__init__()
        self.self_attn = TranslationAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation_function(config.activation_function)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(
        self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, no router logits."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        inner = activated(self.fc1, self.activation, self.final_layer_norm(hidden))
        mixed = self.fc2(F.dropout(inner, self.activation_dropout, self.training))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return clamp_float16(hidden, always=True), probs, None


class M2M100DecoderLayer(nn.Module):
    """Attention to the target, attention to the source, then the MLP."""

    def __init__(self, config: M2M100Config, layer: int) -> None:
        super().__init__()
        self.self_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation_function(config.activation_function)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        context: LayerContext,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, probabilities of both attentions, no router logits."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        attended, cross_probs = self.encoder_attn(
            self.encoder_attn_layer_norm(hidden), context, cross_head_mask, source
        )
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        inner = activated(self.fc1, self.activation, self.final_layer_norm(hidden))
        mixed = self.fc2(F.dropout(inner, self.activation_dropout, self.training))
        return hidden + F.dropout(mixed, self.dropout, self.training), probs, cross_probs, None


class M2M100PreTrainedModel(TranslationPreTrainedModel):
    config_class = M2M100Config


class M2M100Encoder(TranslationEncoder, M2M100PreTrainedModel):
    output_class: ClassVar[Any] = BaseModelOutput


class M2M100Decoder(TranslationDecoder, M2M100PreTrainedModel):
    pass


class M2M100Model(TranslationModel, M2M100PreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    output_class: ClassVar[Any] = Seq2SeqModelOutput

    def __init__(self, config: M2M100Config) -> None:
        super().__init__(config)
        self.encoder = M2M100Encoder(
            config,
            self.shared,
            (M2M100EncoderLayer(config) for _ in range(config.encoder_layers)),
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
