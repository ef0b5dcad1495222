"""Text to token ids and back."""

from moekernels.tokenizers.auto import AutoTokenizer
from moekernels.tokenizers.base import PreTrainedTokenizerBase
from moekernels.tokenizers.bos_eos import GPTNeoXTokenizerFast, LlamaTokenizerFast
from moekernels.tokenizers.encoding import BatchEncoding
from moekernels.tokenizers.fast import PreTrainedTokenizerFast

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "GPTNeoXTokenizerFast",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
]
