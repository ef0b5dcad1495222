"""Encoder and decoder together, and with a language-modelling head."""

from __future__ import annotations

import math

from torch import nn

from moekernels.models.encoder_decoder import EncoderDecoderForConditionalGeneration, EncoderDecoderModel
from moekernels.models.translation.config import TranslationConfig
from moekernels.models.translation.layers import ScaledEmbedding
from moekernels.models.translation.stacks import TranslationPreTrainedModel


class TranslationModel(EncoderDecoderModel, TranslationPreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__(config)
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.shared = ScaledEmbedding(config.vocab_size, config.d_model, config.pad_token_id, scale)


class TranslationForConditionalGeneration(  # type: ignore[override]
    EncoderDecoderForConditionalGeneration, TranslationPreTrainedModel
):
    """Encoder and decoder with a language-modelling head.

    Args:
        config: of the model.
        model: encoder and decoder.
    """

    def __init__(self, config: TranslationConfig, model: TranslationModel) -> None:
        super().__init__(config)
        self.model = model
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()
