"""The same input gives the same bits; in batch-invariant mode a token's bits do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

import moekernels
from moekernels import ops
from tests.generators import LayerShape
from tests.gpu.layer import SHAPE, TOKENS, UNGATED, Layer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", [SHAPE, UNGATED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs(cuda: torch.device, dtype: torch.dtype, shape: LayerShape, num_tokens: int) -> None:
    layer = Layer.random(shape, num_tokens, dtype, cuda)
    first = layer.forward()
    error = (first.cpu().double() - layer.truth()).abs().max().item()
    assert error <= layer.error_scale()
    noise = torch.randn(2048, 2048, device=cuda)
    for _ in range(20):
        noise = noise @ noise / 50  # other work, so that blocks come and go in another order
        assert torch.equal(layer.forward(), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(cuda: torch.device, dtype: torch.dtype) -> None:
    layer = Layer.random(SHAPE, 700, dtype, cuda)
    hidden, logits = layer.x.hidden, layer.logits
    with moekernels.batch_invariant():
        together = layer.forward()
        for begin, end in ((0, 1), (1, 3), (3, 11), (11, 75), (75, 700)):
            layer.x.hidden, layer.logits = hidden[begin:end], logits[begin:end]
            assert torch.equal(layer.forward(), together[begin:end]), (begin, end)
    assert not moekernels.is_batch_invariant()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance_of_the_gemm_alone(cuda: torch.device, dtype: torch.dtype) -> None:
    """One expert with 1 to 500 rows."""
    rows = torch.randn(500, 1024, device=cuda).to(dtype)
    weight = (torch.randn(1, 640, 1024, device=cuda) / 32).to(dtype)

    def run(count: int) -> torch.Tensor:
        offsets = torch.tensor([0, count], dtype=torch.int32, device=cuda)
        return ops.grouped_gemm(rows[:count], weight, offsets, activation="silu", gated=True)

    with moekernels.batch_invariant():
        together = run(500)
        for count in (1, 2, 7, 8, 9, 32, 33, 64, 100, 129, 257):
            assert torch.equal(run(count), together[:count]), count
