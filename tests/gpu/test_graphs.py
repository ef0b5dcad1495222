"""CUDA graphs: nothing between the logits and the output waits for the device."""

from __future__ import annotations

import pytest
import torch

from tests.generators import LayerShape
from tests.gpu.graphs import captured
from tests.gpu.layer import SHAPE, TOKENS, UNGATED, Layer


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", [SHAPE, UNGATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_layer_follows_its_inputs(
    cuda: torch.device, dtype: torch.dtype, shape: LayerShape, num_tokens: int
) -> None:
    """Replayed with other logits and hidden states it gives, bit for bit, what the eager call gives."""
    layer = Layer.random(shape, num_tokens, dtype, cuda)
    graph, out = captured(lambda: layer.forward(capacity=num_tokens // 2 + 1))
    for seed in range(3):
        other = Layer.random(shape, num_tokens, dtype, cuda, seed)
        layer.logits.copy_(other.logits)
        layer.x.hidden.copy_(other.x.hidden)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, layer.forward(capacity=num_tokens // 2 + 1))
        assert out.isfinite().all()


def test_all_routings_fit_one_graph(cuda: torch.device) -> None:
    """Every token to one expert, then spread out: the sizes of the experts live on the device."""
    layer = Layer.random(SHAPE, 64, torch.bfloat16, cuda)
    graph, out = captured(layer.forward)
    for favourite in (None, 0, 15):
        logits = torch.randn(64, SHAPE.num_experts, device=cuda)
        if favourite is not None:
            logits[:, favourite] += 100
        layer.logits.copy_(logits)
        graph.replay()
        error = (out.cpu().double() - layer.truth()).abs().max().item()
        assert error <= layer.error_scale()
