"""Text to token ids and back."""

from moekernels.tokenizers.auto import AutoTokenizer
from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.bos_eos import GPTNeoXTokenizerFast, LlamaTokenizerFast
from moekernels.tokenizers.encoding import BatchEncoding
from moekernels.tokenizers.fast import PreTrainedTokenizerFast
from moekernels.tokenizers.llama import LlamaTokenizer
from moekernels.tokenizers.m2m_100 import M2M100Tokenizer
from moekernels.tokenizers.nllb import NllbTokenizer, NllbTokenizerFast
from moekernels.tokenizers.t5 import T5Tokenizer, T5TokenizerFast

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "GPTNeoXTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "M2M100Tokenizer",
    "NllbTokenizer",
    "NllbTokenizerFast",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
]
