"""Router, experts, dispatcher and the layer made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops
from moekernels.nn import Dispatched, GroupedExperts, LocalDispatcher, SparseMLP, TopKRouter
from moekernels.nn.activations import op_activation
from tests.generators import SMALL_LAYERS, LayerShape
from tests.tolerance import assert_accurate

_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def make(shape: LayerShape, **options: Any) -> SparseMLP:
    mlp = SparseMLP(
        shape.hidden_size,
        shape.ffn_size,
        shape.num_experts,
        shape.top_k,
        activation=shape.activation,
        gated=shape.gated,
        bias=shape.bias,
        **options,
    )
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return mlp


def definition(mlp: SparseMLP, hidden: Tensor, dtype: torch.dtype, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token, choice by choice, for the routing given."""
    experts = mlp.experts

    def cast(x: Tensor | None, e: int) -> Tensor | None:
        return None if x is None else x[e].to(dtype)

    out = torch.zeros(hidden.shape, dtype=dtype)
    for t in range(hidden.shape[0]):
        for k in range(chosen.shape[1]):
            e = int(chosen[t, k])
            up = F.linear(hidden[t].to(dtype), cast(experts.up_weight, e), cast(experts.up_bias, e))
            if experts.gated:
                gate, value = up.chunk(2)
                inner = _ACTIVATIONS[experts.activation](gate) * value
            else:
                inner = _ACTIVATIONS[experts.activation](up)
            down = F.linear(inner, cast(experts.down_proj, e), cast(experts.down_proj_bias, e))
            out[t] += weights[t, k].to(dtype) * down
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_layer(shape: LayerShape, renormalize: bool, dtype: torch.dtype) -> None:
    mlp = make(shape, renormalize=renormalize).to(dtype)
    hidden = torch.randn(11, shape.hidden_size).to(dtype)
    with torch.no_grad():
        out, logits = mlp(hidden)
        torch.testing.assert_close(logits, F.linear(hidden, mlp.gate.weight))
        probs = logits.double().softmax(-1)
        weights, chosen = probs.topk(shape.top_k)
        # Equal logits, which rounding makes, may be chosen in another order.
        chosen = ops.route(logits, shape.top_k)[1].long()
        torch.testing.assert_close(probs.gather(-1, chosen), weights)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        truth = definition(mlp, hidden, torch.float64, chosen, weights)
        assert_accurate(out, truth, definition(mlp, hidden, dtype, chosen, weights))


class Elsewhere:
    """A dispatcher that is not the local one: the same work, and nobody can take the short cut."""

    def __init__(self, num_experts: int) -> None:
        self.local = LocalDispatcher(num_experts)
        self.calls: list[str] = []

    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        self.calls.append("dispatch")
        return self.local.dispatch(hidden, expert_ids, expert_weights)

    def combine(self, rows: Tensor, context: Any) -> Tensor:
        self.calls.append("combine")
        return self.local.combine(rows, context)


@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_dispatchers_give_the_same(shape: LayerShape) -> None:
    elsewhere = Elsewhere(shape.num_experts)
    fused, apart = make(shape), make(shape, dispatcher=elsewhere)
    apart.load_state_dict(fused.state_dict())
    hidden = torch.randn(2, 5, shape.hidden_size)
    results = []
    for mlp in (fused, apart):
        given = hidden.clone().requires_grad_()
        out, logits = mlp(given)
        (out.square().sum() + logits.sum()).backward()
        results.append((out, given.grad, *(p.grad for p in mlp.parameters())))
    assert elsewhere.calls == ["dispatch", "combine"]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=0)


def test_ugly_inputs() -> None:
    mlp = make(LayerShape("ungainly", 12, 7, 5, 2)).eval()
    with torch.no_grad():
        out, logits = mlp(torch.empty(0, 3, 12))
        assert out.shape == (0, 3, 12) and logits.shape == (0, 5)
        hidden = torch.randn(12, 6, 4).permute(1, 2, 0)
        torch.testing.assert_close(mlp(hidden)[0], mlp(hidden.contiguous())[0])
        expected = mlp(hidden)[0]
        broken = hidden.clone()
        broken[2, 1] = float("nan")
        actual = mlp(broken)[0]
    assert torch.isnan(actual[2, 1]).all()
    actual[2, 1] = expected[2, 1]
    torch.testing.assert_close(actual, expected)


def test_one_expert_takes_all() -> None:
    mlp = make(LayerShape("crowded", 8, 6, 4, 1))
    with torch.no_grad():
        mlp.gate.weight.zero_()
        mlp.gate.weight[2] = 1.0
        hidden = torch.rand(20, 8)
        out, logits = mlp(hidden)
        chosen = torch.full((20, 1), 2)
        truth = definition(mlp, hidden, torch.float64, chosen, logits.double().softmax(-1)[:, 2:3])
    torch.testing.assert_close(out, truth.float())


def test_masked_tokens_visit_no_expert() -> None:
    mlp = make(LayerShape("masked", 8, 6, 4, 2, bias=True))
    hidden, mask = torch.randn(2, 3, 8), torch.tensor([[1, 0, 1], [1, 1, 0]])
    with torch.no_grad():
        out, whole = mlp(hidden, mask)[0], mlp(hidden)[0]
        assert torch.equal(mlp(hidden, mask.bool())[0], out)
    assert (out[mask == 0] == 0).all()
    torch.testing.assert_close(out[mask == 1], whole[mask == 1])


def test_input_follows_the_weights() -> None:
    mlp = make(LayerShape("float32", 8, 6, 4, 2))
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    out, logits = mlp(hidden)
    assert out.dtype == logits.dtype == torch.float32
    assert torch.equal(out, mlp(hidden.float())[0])


def test_capacity_of_the_local_dispatcher() -> None:
    dispatcher = LocalDispatcher(3, capacity=2)
    hidden = torch.randn(4, 5)
    ids = torch.zeros(4, 1, dtype=torch.int32)
    rows, offsets, context = dispatcher.dispatch(hidden, ids, torch.full((4, 1), 0.5))
    assert offsets.tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(dispatcher.combine(rows, context), torch.cat((hidden[:2] * 0.5, torch.zeros(2, 5))))


def test_parameters_and_their_names() -> None:
    gated, plain = GroupedExperts(4, 3, 2), GroupedExperts(4, 3, 2, gated=False, bias=True)
    assert {n: tuple(p.shape) for n, p in gated.named_parameters()} == {
        "gate_up_proj": (2, 6, 4),
        "down_proj": (2, 4, 3),
    }
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {
        "up_proj": (2, 3, 4),
        "down_proj": (2, 4, 3),
        "up_proj_bias": (2, 3),
        "down_proj_bias": (2, 4),
    }
    assert (plain.up_proj_bias == 0).all() and (plain.down_proj_bias == 0).all()


def test_wrong_sizes() -> None:
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=rf"top_k must be between 1 and num_experts \(4\), got {top_k}"):
            TopKRouter(8, 4, top_k)


def test_activation_names() -> None:
    assert op_activation("gelu_pytorch_tanh") == op_activation("gelu_new") == "gelu_tanh"
    assert op_activation("swish") == "silu"
    with pytest.raises(ValueError, match="unknown activation 'selu', expected one of relu, gelu"):
        op_activation("selu")
