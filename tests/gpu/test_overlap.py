"""Our ops alone at a few tokens: small grids in a row, each of which starts while the one before it still runs.

MOEKERNELS_CUDA_OVERLAP=off shows whether a failure here is one of overlap.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels import ops
from tests.generators import LayerShape
from tests.gpu.layer import Layer

SHAPE = LayerShape("overlap", 512, 256, 16, 4)
LAYERS = 24  # in a row
REPEATS = 30


def _chain(layers: list[Layer], hidden: Tensor, wait: bool) -> Tensor:
    """Every layer's output is the next one's input, with nothing of torch's in between."""

    def done(x: Tensor) -> Tensor:
        if wait:
            torch.cuda.synchronize()
        return x

    for step in range(LAYERS):
        layer = layers[step % len(layers)]
        weights, expert_ids = ops.route(hidden[:, : SHAPE.num_experts], SHAPE.top_k)
        done(expert_ids)
        plan = ops.plan(expert_ids, SHAPE.num_experts)
        done(plan.row_of_slot)
        up = ops.grouped_gemm(
            hidden,
            layer.x.up_weight,
            plan.expert_offsets,
            token_of_row=plan.token_of_row,
            activation="silu",
            gated=True,
        )
        down = done(ops.grouped_gemm(done(up), layer.x.down_weight, plan.expert_offsets))
        hidden = done(ops.unpermute(down, plan.row_of_slot, weights))
    return hidden


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_bit_changes(cuda: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    layers = [Layer.random(SHAPE, num_tokens, dtype, cuda, seed) for seed in range(4)]
    for layer in layers:  # about as large as their inputs, so that 24 of them stay finite
        layer.x.down_weight *= 8
    hidden = layers[0].x.hidden
    alone = _chain(layers, hidden, wait=True)
    assert alone.isfinite().all() and alone.abs().max() > 1e-6
    for repeat in range(REPEATS):
        assert torch.equal(_chain(layers, hidden, wait=False), alone), repeat
