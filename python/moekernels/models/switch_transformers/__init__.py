"""Switch Transformers (arXiv 2101.03961): T5 whose every n-th MLP sends each token to one of many experts."""

from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.models.switch_transformers.layers import (
    SwitchTransformersAttention,
    SwitchTransformersDecoderBlock,
    SwitchTransformersEncoderBlock,
    SwitchTransformersLayerCrossAttention,
    SwitchTransformersLayerFF,
    SwitchTransformersLayerSelfAttention,
)
from moekernels.models.switch_transformers.mlp import SwitchTransformersDenseActDense, SwitchTransformersSparseMLP
from moekernels.models.switch_transformers.model import (
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)
from moekernels.models.switch_transformers.router import SwitchTransformersTop1Router
from moekernels.models.switch_transformers.stacks import (
    SwitchTransformersDecoder,
    SwitchTransformersEncoder,
    SwitchTransformersPreTrainedModel,
    SwitchTransformersStack,
)

__all__ = [
    "SwitchTransformersAttention",
    "SwitchTransformersConfig",
    "SwitchTransformersDecoder",
    "SwitchTransformersDecoderBlock",
    "SwitchTransformersDenseActDense",
    "SwitchTransformersEncoder",
    "SwitchTransformersEncoderBlock",
    "SwitchTransformersEncoderModel",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersLayerCrossAttention",
    "SwitchTransformersLayerFF",
    "SwitchTransformersLayerSelfAttention",
    "SwitchTransformersModel",
    "SwitchTransformersPreTrainedModel",
    "SwitchTransformersSparseMLP",
    "SwitchTransformersStack",
    "SwitchTransformersTop1Router",
]
