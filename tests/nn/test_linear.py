from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from moekernels import batch_invariant
from moekernels.nn import Linear
from moekernels.nn.linear import project, project_in
from moekernels.ops import linear
from moekernels.ops.linear import ACTIVATION_FUNCTIONS
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
    monkeypatch.setattr(sys.modules["moekernels.ops.linear"], "run", forbidden)
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
def test_a_projection_has_the_bits_of_layer_and_activation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    fast, x = Linear(40, 24).to(dtype), torch.randn(shape).to(dtype)
    plain = nn.Linear(40, 24).to(dtype)
    plain.load_state_dict(fast.state_dict())
    for name, activation in ACTIVATION_FUNCTIONS.items():
        assert torch.equal(project(plain, x, name), activation(fast(x)))
        assert torch.equal(project(fast, x, name), activation(fast(x)))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _by_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def _by_pre_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def _by_class(layer: nn.Linear) -> None:
    layer.__class__ = Doubled


def _by_instance(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * F.linear(x, layer.weight)  # type: ignore[method-assign]


def _by_parametrization(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", Twice())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("attach", [_by_hook, _by_pre_hook, _by_class, _by_instance, _by_parametrization])
@torch.no_grad()
def test_what_is_attached_to_a_layer_takes_part(attach: Any) -> None:
    layer, x = nn.Linear(40, 24, bias=False), torch.randn(3, 40)
    expected = 2 * F.linear(x, layer.weight)
    attach(layer)
    torch.testing.assert_close(project(layer, x), expected)
    torch.testing.assert_close(project(layer, x, "relu"), expected.relu())
    torch.testing.assert_close(project_in(torch.float32, layer, x), expected)


@torch.no_grad()
def test_bits_do_not_depend_on_who_watches() -> None:
    layer, x = nn.Linear(40, 24), torch.randn(70, 40)
    with batch_invariant():
        expected = project(layer, x)
        layer.register_forward_hook(lambda *_: None)
        assert torch.equal(project(layer, x), expected)
        assert torch.equal(project(layer, x[:1]), expected[:1])


@torch.no_grad()
def test_global_hooks_see_a_projection() -> None:
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    seen: list[Tensor] = []
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output)):
        assert torch.equal(project(layer, x, "relu"), linear(x, layer.weight, layer.bias).relu())
    assert len(seen) == 1 and torch.equal(seen[0], linear(x, layer.weight, layer.bias))


def test_gradients_and_graph_of_a_projection() -> None:
    layer, x = nn.Linear(40, 24), torch.randn(3, 40, requires_grad=True)
    ours, plain = (
        torch.autograd.grad(out.sum(), (x, layer.weight, layer.bias))
        for out in (project(layer, x, "relu"), F.relu(F.linear(x, layer.weight, layer.bias)))
    )
    assert all(map(torch.equal, ours, plain))
    calls: list[int] = []
    with layer.register_full_backward_hook(lambda *_: calls.append(1)):
        project(layer, x, "relu").sum().backward()
    assert calls == [1]
    with torch.no_grad():
        compiled = torch.compile(lambda x: project(layer, x, "relu"), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), project(layer, x, "relu"))


class Packed(Tensor):
    """A weight as quantisers make it: a subclass that knows torch's linear and no operator of ours."""

    inner: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> Packed:
        made: Any = Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)  # type: ignore[attr-defined]
        made.inner = data
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return func(*(x.inner if isinstance(x, Packed) else x for x in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"no rule for {func}")


@pytest.mark.parametrize("rows", [1, 4000])
@torch.no_grad()
def test_weights_of_a_tensor_subclass(rows: int) -> None:
    x = torch.randn(rows, 40)
    for layer in (Linear(40, 24), nn.Linear(40, 24)):
        expected = F.linear(x, layer.weight, layer.bias)
        layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
        assert torch.equal(layer(x), expected) and torch.equal(project(layer, x), expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_dtype_of_its_own(weights: torch.dtype, autocast: bool) -> None:
    """Computed in that dtype, whatever the weights and autocast have; the module is called all the same."""
    layer, x = nn.Linear(40, 24).to(weights), torch.randn(3, 40).bfloat16()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = project_in(torch.float32, layer, x)
    assert calls == [1] and layer.weight.dtype == weights
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    assert torch.equal(out, expected)
    out.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == weights
    torch.testing.assert_close(layer.weight.grad, x.float().sum(0).expand(24, 40).to(weights))


@torch.no_grad()
def test_a_dtype_of_its_own_for_what_has_none() -> None:
    layer = nn.Sequential(nn.Linear(40, 24))
    x = torch.randn(3, 40)
    assert project_in(torch.bfloat16, layer, x).dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)[0]
    assert type(quantised) is not nn.Linear
    assert project_in(torch.float32, quantised, x.bfloat16()).dtype == torch.float32
