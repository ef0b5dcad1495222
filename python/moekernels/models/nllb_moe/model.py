"""Encoder and decoder, together and with a language-modelling head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moekernels.models.losses import load_balancing_loss, total
from moekernels.models.nllb_moe.config import TOP_K, NllbMoeConfig
from moekernels.models.nllb_moe.layers import NllbMoeDecoderLayer, NllbMoeEncoderLayer
from moekernels.models.translation import (
    TranslationDecoder,
    TranslationEncoder,
    TranslationForConditionalGeneration,
    TranslationModel,
    TranslationPreTrainedModel,
)
from moekernels.nn import Batch


class NllbMoePreTrainedModel(TranslationPreTrainedModel):
    config_class = NllbMoeConfig

    def _keeps_float32(self, name: str) -> bool:
        return self.config.router_dtype == "float32" and ".router.classifier." in name


class NllbMoeEncoder(TranslationEncoder, NllbMoePreTrainedModel):
    pass


class NllbMoeDecoder(TranslationDecoder, NllbMoePreTrainedModel):
    pass


class NllbMoeModel(TranslationModel, NllbMoePreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__(config)
        self.encoder = NllbMoeEncoder(
            config,
            self.shared,
            (NllbMoeEncoderLayer(config, i) for i in range(config.encoder_layers)),
        )
        self.decoder = NllbMoeDecoder(
            config,
            self.shared,
            (NllbMoeDecoderLayer(config, i) for i in range(config.decoder_layers)),
        )
        self.post_init()


class NllbMoeForConditionalGeneration(TranslationForConditionalGeneration, NllbMoePreTrainedModel):  # type: ignore[override]
    """Encoder and decoder with a language-modelling head, which generates translations."""

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__(config, NllbMoeModel(config))

    def _router_losses(
        self, outputs: Any, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        losses = {
            "encoder_aux_loss": _balance(outputs.encoder_router_logits, attention_mask, self.batch),
            "decoder_aux_loss": _balance(outputs.decoder_router_logits, decoder_attention_mask, self.batch),
        }
        there = [self.config.router_aux_loss_coef * loss for loss in losses.values() if loss is not None]
        return total(there), losses


def _balance(router_logits: tuple[Tensor, ...] | None, attention_mask: Tensor | None, batch: Batch) -> Tensor | None:
    """The load-balancing loss of a stack, without its padding; None if it has no sparse layer."""
    if not router_logits:
        return None
    return load_balancing_loss(router_logits, TOP_K, attention_mask, batch)
