"""Mixture-of-Experts kernels for PyTorch, and the models built on them.

``moekernels.ops`` holds the kernels as plain functions, ``moekernels.nn`` modules made of them. The names below are the
models and what runs them, with the interface of their Hugging Face documentation pages.
"""

from moekernels import nn, ops
from moekernels._library import build_info
from moekernels._settings import batch_invariant, cpu_isa, is_batch_invariant
from moekernels._version import __version__
from moekernels.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from moekernels.models import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    PretrainedConfig,
    PreTrainedModel,
)
from moekernels.tokenizers import (
    AutoTokenizer,
    BatchEncoding,
    GPTNeoXTokenizerFast,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
)

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "GPTNeoXTokenizerFast",
    "GenerationConfig",
    "LlamaTokenizerFast",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeModel",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
    "batch_invariant",
    "build_info",
    "cpu_isa",
    "is_batch_invariant",
    "nn",
    "ops",
]
