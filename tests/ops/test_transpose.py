"""The transposition that factors of adapters are read by."""

from __future__ import annotations

import pytest
import torch

transpose = torch.ops.moekernels.transpose.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 70), (32, 16), (64, 64), (130, 33), (2048, 1024)], ids=str)
def test_every_element(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape).to(dtype)
    out = transpose(matrix)
    assert out.is_contiguous() and torch.equal(out, matrix.t())


def test_strides() -> None:
    wide = torch.randn(70, 90)
    for matrix in (wide[:, 3:70], wide[::2], wide.t()):
        assert torch.equal(transpose(matrix), matrix.t())


def test_errors() -> None:
    with pytest.raises(RuntimeError, match=r"transpose: matrix must have 2 dimensions \[num_rows, num_cols\], got 1"):
        transpose(torch.zeros(3))
    with pytest.raises(RuntimeError, match="transpose: matrix must be float32, bfloat16 or float16, got float64"):
        transpose(torch.zeros(3, 3, dtype=torch.float64))
