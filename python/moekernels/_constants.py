"""Small tensors that are made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Make = TypeVar("_Make", bound=Callable[..., Tensor])


def made_once(make: _Make) -> _Make:
    """Keep what a function of hashable arguments returns, and return it again.

    Not while something else stands for tensors, a mode such as FakeTensorMode or the compiler: what is made then is
    none that others could use.
    """
    kept = functools.lru_cache(make)

    @functools.wraps(make)
    def get(*arguments: object) -> Tensor:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return make(*arguments)
        with torch.inference_mode(False):
            return kept(*arguments)

    return get  # type: ignore[return-value]
