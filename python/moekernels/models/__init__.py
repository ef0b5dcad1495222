"""The models, and the classes that find them by name."""

from moekernels._devices import infer_device
from moekernels.models.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from moekernels.models.base import PreTrainedModel
from moekernels.models.configuration import PretrainedConfig
from moekernels.models.m2m_100 import M2M100Config, M2M100ForConditionalGeneration, M2M100Model
from moekernels.models.nllb_moe import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)
from moekernels.models.olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from moekernels.models.phimoe import (
    PhimoeConfig,
    PhimoeForCausalLM,
    PhimoeForSequenceClassification,
    PhimoeModel,
)
from moekernels.models.quantization import BitsAndBytesConfig, QuantizationConfig
from moekernels.models.switch_transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "BitsAndBytesConfig",
    "M2M100Config",
    "M2M100ForConditionalGeneration",
    "M2M100Model",
    "NllbMoeConfig",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeModel",
    "PhimoeConfig",
    "PhimoeForCausalLM",
    "PhimoeForSequenceClassification",
    "PhimoeModel",
    "PreTrainedModel",
    "PretrainedConfig",
    "QuantizationConfig",
    "SwitchTransformersConfig",
    "SwitchTransformersEncoderModel",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersModel",
    "SwitchTransformersSparseMLP",
    "SwitchTransformersTop1Router",
    "infer_device",
]
