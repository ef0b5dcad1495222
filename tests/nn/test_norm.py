from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.nn import RMSNorm
from tests.tolerance import assert_accurate


def definition(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 7), (3, 1), (2, 5, 37), (4, 2048)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])
def test_values(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    norm = RMSNorm(shape[-1], eps=1e-5, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    hidden = (torch.randn(shape) * scale).to(dtype)
    with torch.no_grad():
        truth = definition(hidden.double(), norm.weight.double(), 1e-5)
        assert_accurate(norm(hidden), truth, definition(hidden, norm.weight, 1e-5))


def test_gradients() -> None:
    norm = RMSNorm(6, eps=1e-3, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(norm, torch.randn(4, 6, dtype=torch.float64, requires_grad=True))


def test_the_weight_decides_the_dtype() -> None:
    assert RMSNorm(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
