"""Mixture-of-Experts kernels for PyTorch, and the models built on them.

``moekernels.ops`` holds the kernels as plain functions, ``moekernels.nn`` modules made of them, and the names below are
the models, with the interface of their Hugging Face documentation pages.
"""

from moekernels._library import build_info
from moekernels._settings import batch_invariant, cpu_isa, is_batch_invariant
from moekernels._version import __version__

__all__ = ["__version__", "batch_invariant", "build_info", "cpu_isa", "is_batch_invariant"]
