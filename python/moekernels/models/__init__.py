"""The models, and the classes that find them by name."""

from moekernels.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
from moekernels.models.base import PreTrainedModel
from moekernels.models.configuration import PretrainedConfig
from moekernels.models.olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeModel",
    "PreTrainedModel",
    "PretrainedConfig",
]
