"""How the Python functions call the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Call a registered op; what its checks found wrong becomes a ValueError."""
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if message.startswith("moekernels::"):
            raise ValueError(message) from None
        raise
