"""Activation names as model configurations spell them, and what the ops call them."""

from __future__ import annotations

_OP_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    # The same tanh approximation under four names (arXiv 1606.08415).
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "linear": "none",
}


def op_activation(name: str) -> str:
    """The name :mod:`moekernels.ops` gives the activation a configuration calls `name`.

    Raises:
        ValueError: the kernels have no such activation.
    """
    try:
        return _OP_ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(_OP_ACTIVATIONS)}") from None
