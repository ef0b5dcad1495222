"""What encoder-decoder models share: the run through the stacks, caches and masks, the head, the losses.

A model brings its layers, its embedding of tokens and positions, and its norms.
"""

from moekernels.models.context import LayerContext, LayerOutput
from moekernels.models.encoder_decoder.layers import EncoderDecoderAttention, clamp_float16
from moekernels.models.encoder_decoder.model import (
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderModel,
)
from moekernels.models.encoder_decoder.stacks import (
    DecoderStack,
    EncoderDecoderPreTrainedModel,
    EncoderDecoderStack,
    EncoderStack,
    shift_tokens_right,
)

__all__ = [
    "DecoderStack",
    "EncoderDecoderAttention",
    "EncoderDecoderForConditionalGeneration",
    "EncoderDecoderModel",
    "EncoderDecoderPreTrainedModel",
    "EncoderDecoderStack",
    "EncoderStack",
    "LayerContext",
    "LayerOutput",
    "clamp_float16",
    "shift_tokens_right",
]
