"""Mixture-of-Experts kernels for PyTorch, and the models built on them.

``moekernels.ops`` holds the kernels as plain functions, ``moekernels.nn`` modules made of them. The names below are the
models and what runs them, with the interface of their Hugging Face documentation pages. They are imported when one of
them is first used, so that who wants the kernels alone does not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moekernels import nn, ops
from moekernels._library import build_info, cmake_dir, include_dir
from moekernels._memory import release_memory
from moekernels._settings import batch_invariant, cpu_isa, is_batch_invariant
from moekernels._version import __version__

if TYPE_CHECKING:
    from moekernels.generation import (
        GenerateBeamDecoderOnlyOutput,
        GenerateBeamEncoderDecoderOutput,
        GenerateDecoderOnlyOutput,
        GenerateEncoderDecoderOutput,
        GenerationConfig,
        TextIteratorStreamer,
        TextStreamer,
    )
    from moekernels.models import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        BitsAndBytesConfig,
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
        PhimoeConfig,
        PhimoeForCausalLM,
        PhimoeForSequenceClassification,
        PhimoeModel,
        PretrainedConfig,
        PreTrainedModel,
        QuantizationConfig,
        SwitchTransformersConfig,
        SwitchTransformersEncoderModel,
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersModel,
        SwitchTransformersSparseMLP,
        SwitchTransformersTop1Router,
        infer_device,
    )
    from moekernels.pipelines import pipeline
    from moekernels.tokenizers import (
        AutoTokenizer,
        BatchEncoding,
        GPTNeoXTokenizerFast,
        LlamaTokenizer,
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
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "BitsAndBytesConfig",
    "GPTNeoXTokenizerFast",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateBeamEncoderDecoderOutput",
    "GenerateDecoderOnlyOutput",
    "GenerateEncoderDecoderOutput",
    "GenerationConfig",
    "LlamaTokenizer",
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
    "PhimoeConfig",
    "PhimoeForCausalLM",
    "PhimoeForSequenceClassification",
    "PhimoeModel",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "QuantizationConfig",
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
    "cmake_dir",
    "cpu_isa",
    "include_dir",
    "infer_device",
    "is_batch_invariant",
    "nn",
    "ops",
    "pipeline",
    "release_memory",
]

# Where the other names of `__all__` are from; none imports what stands after it.
_PARTS = ("tokenizers", "generation", "models", "pipelines")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"moekernels.{name}")
    for part in _PARTS if name in __all__ else ():
        module = import_module(f"moekernels.{part}")
        if name in module.__all__:
            globals()[name] = value = getattr(module, name)  # from now on found without this function
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
