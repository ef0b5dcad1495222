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
    AutoModelForSeq2SeqLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Model,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    PretrainedConfig,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)
from moekernels.tokenizers import (
    AutoTokenizer,
    BatchEncoding,
    GPTNeoXTokenizerFast,
    LlamaTokenizerFast,
    M2M100Tokenizer,
    NllbTokenizer,
    NllbTokenizerFast,
    PreTrainedTokenizerFast,
    T5Tokenizer,
    T5TokenizerFast,
)

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoTokenizer",
    "BatchEncoding",
    "GPTNeoXTokenizerFast",
    "GenerationConfig",
    "LlamaTokenizerFast",
    "M2M100Config",
    "M2M100ForConditionalGeneration",
    "M2M100Model",
    "M2M100Tokenizer",
    "NllbMoeConfig",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
    "NllbTokenizer",
    "NllbTokenizerFast",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeModel",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "SwitchTransformersConfig",
    "SwitchTransformersEncoderModel",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersModel",
    "SwitchTransformersSparseMLP",
    "SwitchTransformersTop1Router",
    "T5Tokenizer",
    "T5TokenizerFast",
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
