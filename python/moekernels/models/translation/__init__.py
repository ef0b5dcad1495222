"""What M2M100 and NLLB-MoE share: everything but their layers.

Pre-norm encoder and decoder with sinusoidal positions and one embedding for source, target and head
(arXiv 2010.11125, arXiv 2207.04672).
"""

from moekernels.models.encoder_decoder import LayerContext, LayerOutput, clamp_float16, shift_tokens_right
from moekernels.models.translation.config import TranslationConfig
from moekernels.models.translation.layers import TranslationAttention
from moekernels.models.translation.model import TranslationForConditionalGeneration, TranslationModel
from moekernels.models.translation.stacks import TranslationDecoder, TranslationEncoder, TranslationPreTrainedModel

__all__ = [
    "LayerContext",
    "LayerOutput",
    "TranslationAttention",
    "TranslationConfig",
    "TranslationDecoder",
    "TranslationEncoder",
    "TranslationForConditionalGeneration",
    "TranslationModel",
    "TranslationPreTrainedModel",
    "clamp_float16",
    "shift_tokens_right",
]
