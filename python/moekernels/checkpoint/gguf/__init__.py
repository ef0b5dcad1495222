"""GGUF files, as llama.cpp writes them: metadata, and weights that stay packed."""

from moekernels.checkpoint.gguf.names import GGUF_KEY_MAPS
from moekernels.checkpoint.gguf.reader import GgufReader

__all__ = ["GGUF_KEY_MAPS", "GgufReader"]
