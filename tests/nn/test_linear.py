from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.nn import Linear
from moekernels.nn.linear import activated
from moekernels.ops import linear
from tests.tolerance import assert_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (64, 40), (65, 40), (2, 3, 40), (0, 40), (2, 0, 40)], ids=str)
@torch.no_grad()
def test_as_accurate_as_that_of_torch(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = Linear(40, 24, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    parameters = [None if p is None else p.double() for p in (layer.weight, layer.bias)]
    truth = torch.nn.functional.linear(x.double(), *parameters)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    out = layer(x)
    assert out.shape == (*shape[:-1], 24) and out.dtype == dtype
    assert_accurate(out, truth, plain)


@torch.no_grad()
def test_strided_input_and_weight() -> None:
    x, weight = torch.randn(40, 5).T, torch.randn(40, 24).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    torch.testing.assert_close(linear(torch.randn(3, 5, 40).transpose(0, 1)[:2], weight).shape, torch.Size([2, 3, 24]))


def test_what_the_kernel_does_not_serve_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("called")

    layer = Linear(40, 24)
    with torch.no_grad():
        expected = layer(torch.ones(3, 40))
    monkeypatch.setattr(sys.modules["moekernels.ops.linear"], "call", forbidden)
    x = torch.ones(3, 40, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, torch.full((24, 40), 3.0))
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.ones(1025, 40))[:3], expected)
        layer.double()(torch.ones(3, 40).double())
        assert layer.to("meta")(torch.ones(3, 40, device="meta")).shape == (3, 24)
        with pytest.raises(AssertionError, match="called"):
            Linear(40, 24)(torch.ones(3, 40))


def test_wrong_width() -> None:
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="41"):
        Linear(40, 24)(torch.ones(3, 41))


def test_compiles_and_autocasts() -> None:
    layer = Linear(40, 24)
    x = torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 40), (2, 100, 40), (0, 40)], ids=str)
@torch.no_grad()
def test_an_activated_layer_has_the_bits_of_layer_and_activation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, x = Linear(40, 24).to(dtype), torch.randn(shape).to(dtype)
    for activation in (F.relu, F.gelu):
        assert torch.equal(activated(layer, activation, x), activation(layer(x)))


@torch.no_grad()
def test_whoever_watches_a_layer_sees_what_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(40, 24), torch.randn(3, 40)
    expected = layer(x)
    assert (expected < 0).any()
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    def check() -> None:
        assert torch.equal(activated(layer, F.relu, x), expected.relu())
        assert len(seen) == 1 and torch.equal(seen.pop(), expected)

    with layer.register_forward_hook(watch):
        check()
    with nn.modules.module.register_module_forward_hook(watch):
        check()
    with layer.register_forward_pre_hook(lambda *_: seen.append(expected)):
        check()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda x: seen.append(expected) or expected)
        check()
    activated(layer, F.relu, x)
    assert not seen

    class Doubled(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    doubled = Doubled(40, 24)
    doubled.load_state_dict(layer.state_dict())
    assert torch.equal(activated(doubled, F.relu, x), 2 * expected.relu())


def test_gradients_and_graph_of_an_activated_layer() -> None:
    layer, x = Linear(40, 24), torch.randn(3, 40, requires_grad=True)
    ours, plain = (
        torch.autograd.grad(out.sum(), (x, layer.weight, layer.bias))
        for out in (activated(layer, F.relu, x), F.relu(F.linear(x, layer.weight, layer.bias)))
    )
    assert all(map(torch.equal, ours, plain))
    calls: list[int] = []
    with layer.register_full_backward_hook(lambda *_: calls.append(1)):
        activated(layer, F.relu, x).sum().backward()
    assert calls == [1]
    with torch.no_grad():
        compiled = torch.compile(lambda x: activated(layer, F.relu, x), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), activated(layer, F.relu, x))
