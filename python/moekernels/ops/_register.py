"""Shape functions and gradients of the ops. Their schemas and kernels are C++ (csrc/torch/library.cpp)."""

import moekernels._library  # noqa: F401  (loads the ops)
from moekernels.ops import _gradients, _shapes  # noqa: F401
