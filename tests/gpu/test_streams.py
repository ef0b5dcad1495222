"""Work goes to the caller's stream and device."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.layer import SHAPE, TOKENS, Layer


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_a_side_stream_sees_its_own_order(cuda: torch.device, num_tokens: int) -> None:
    """The inputs are made on a side stream after a long wait: a launch on another stream would read them too early."""
    truth = Layer.random(SHAPE, num_tokens, torch.bfloat16, cuda)
    expected = truth.forward()
    layer = Layer.random(SHAPE, num_tokens, torch.bfloat16, cuda)
    layer.logits.zero_()
    layer.x.hidden.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        layer.logits.copy_(truth.logits)
        layer.x.hidden.copy_(truth.x.hidden)
        out = layer.forward()
        result = out.clone()
    side.synchronize()
    assert torch.equal(result, expected)


def test_back_to_back_launches_keep_their_order(cuda: torch.device) -> None:
    """Each call reads what the one before it wrote, and its output is overwritten at once: no overlap may show."""
    layers = [Layer.random(SHAPE, 4, torch.bfloat16, cuda, seed) for seed in range(4)]

    def chain() -> torch.Tensor:
        hidden = layers[0].x.hidden
        for step in range(40):
            layer = layers[step % 4]
            layer.x.hidden = hidden
            hidden = layer.forward()
            hidden = hidden / hidden.float().square().mean().sqrt().clamp(min=1e-3).to(hidden.dtype)
        return hidden

    first = layers[0].x.hidden.clone()
    results = []
    for _ in range(5):
        layers[0].x.hidden = first.clone()
        results.append(chain())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_the_second_device_stay_there() -> None:
    devices = [torch.device("cuda", i) for i in range(2)]
    outputs = []
    for device in (devices[1], devices[0], devices[1]):  # the current device is 0 throughout
        layer = Layer.random(SHAPE, 40, torch.bfloat16, "cpu")
        for name, value in vars(layer.x).items():
            setattr(layer.x, name, None if value is None else value.to(device))
        layer.logits = layer.logits.to(device)
        out = layer.forward()
        assert out.device == device
        outputs.append(out.cpu())
    assert torch.cuda.current_device() == 0
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
