"""Encoder and decoder: embedding and positions, and the norm after the last layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moekernels.models.encoder_decoder import (
    DecoderStack,
    EncoderDecoderPreTrainedModel,
    EncoderDecoderStack,
    EncoderStack,
)
from moekernels.models.translation.config import TranslationConfig
from moekernels.nn.positions import SinusoidalPositions, positions_of_tokens


class TranslationPreTrainedModel(EncoderDecoderPreTrainedModel):
    """The base of all parts of M2M100 and NLLB-MoE."""


class TranslationStack(EncoderDecoderStack, TranslationPreTrainedModel):
    """What encoder and decoder have in common.

    Args:
        config: of the model.
        shared: the embedding.
        layers: the layers.
        num_heads: heads of their attentions.
        layerdrop: probability of leaving a layer out in training.
    """

    def __init__(
        self,
        config: TranslationConfig,
        shared: nn.Embedding,
        layers: Iterable[nn.Module],
        num_heads: int,
        layerdrop: float,
    ) -> None:
        super().__init__(config)
        self.num_heads = num_heads
        self.layerdrop = layerdrop
        self.embed_tokens = shared
        self.embed_positions = SinusoidalPositions(
            config.max_position_embeddings + 2, config.d_model, config.pad_token_id
        )
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model)

    @property
    def _layers(self) -> nn.ModuleList:
        return self.layers

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: Tensor | int, num_positions: int
    ) -> Tensor:
        padding_idx = self.config.pad_token_id
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_tokens(input_ids)
            positions = positions_of_tokens(input_ids, padding_idx, past)
        else:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + (past + padding_idx + 1)
        hidden = inputs_embeds + self.embed_positions(positions, padding_idx + 1 + num_positions, inputs_embeds.dtype)
        return nn.functional.dropout(hidden, p=self.config.dropout, training=self.training)

    def _finish(self, hidden: Tensor) -> Tensor:
        return self.layer_norm(hidden)


class TranslationEncoder(TranslationStack, EncoderStack):
    """Source tokens to hidden states."""

    def __init__(self, config: TranslationConfig, shared: nn.Embedding, layers: Iterable[nn.Module]) -> None:
        super().__init__(config, shared, layers, config.encoder_attention_heads, config.encoder_layerdrop)


class TranslationDecoder(TranslationStack, DecoderStack):
    """Target tokens and the encoder's output to hidden states."""

    def __init__(self, config: TranslationConfig, shared: nn.Embedding, layers: Iterable[nn.Module]) -> None:
        super().__init__(config, shared, layers, config.decoder_attention_heads, config.decoder_layerdrop)
