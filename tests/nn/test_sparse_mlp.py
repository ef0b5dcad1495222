"""Router, experts, dispatcher and the layer made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops
from moekernels.nn import GroupedExperts, LocalDispatcher, RouterOutput, SparsemixerRouter, SparseMLP, TopKRouter
from moekernels.nn.activations import op_activation
from moekernels.nn.dispatcher import Experts
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
        torch.testing.assert_close(logits, F.linear(hidden, mlp.router.weight))
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
    """A dispatcher that calls the experts as one of another process would: every row is a token with one choice."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_calls = 0

    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        self.num_calls += 1
        plan = ops.plan(routing.expert_ids, self.num_experts)
        rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
        counts = plan.expert_offsets.diff()
        ids = torch.arange(self.num_experts).repeat_interleave(counts)[:, None].int()
        # Those that an expert would have sent back to front.
        order = torch.randperm(rows.shape[0])
        there = experts(rows[order], rows.new_ones(rows.shape[0], 1).float(), ops.plan(ids[order], self.num_experts))
        return ops.unpermute(there[order.argsort()], plan.row_of_slot, routing.routing_weights)


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
    assert elsewhere.num_calls == 1
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
        mlp.router.weight.zero_()
        mlp.router.weight[2] = 1.0
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
    routing = RouterOutput(torch.empty(4, 3), torch.full((4, 1), 0.5), torch.zeros(4, 1, dtype=torch.int32))

    def experts(hidden: Tensor, routing_weights: Tensor, plan: ops.Plan) -> Tensor:
        assert plan.expert_offsets.tolist() == [0, 2, 2, 2]
        return ops.unpermute(ops.permute(hidden, plan.token_of_row), plan.row_of_slot, routing_weights)

    out = dispatcher.run(hidden, routing, experts)
    torch.testing.assert_close(out, torch.cat((hidden[:2] * 0.5, torch.zeros(2, 5))))


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


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "top_k 0": ({"top_k": 0}, r"TopKRouter: top_k must be between 1 and num_experts \(4\), got 0"),
    "top_k 5": ({"top_k": 5}, r"top_k must be between 1 and num_experts \(4\), got 5"),
    "hidden": ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    "ffn": ({"ffn_size": -3}, "GroupedExperts: ffn_size must be a positive integer, got -3"),
    "experts": ({"num_experts": 0}, "num_experts must be a positive integer, got 0"),
    "fraction": ({"ffn_size": 2.5}, "ffn_size must be a positive integer, got 2.5"),
    "activation": (
        {"activation": "swiglu"},
        "activation must be one of none, relu, .*, got 'swiglu'",
    ),
    "scoring": ({"scoring": "sigmoid"}, "scoring must be one of softmax, top2_gate, sparsemixer, got 'sigmoid'"),
    "sparsemixer": (
        {"scoring": "sparsemixer", "top_k": 3},
        "top_k must be 2, .* sparsemixer chooses, got 3",
    ),
    "top2_gate": ({"scoring": "top2_gate", "top_k": 1}, "top_k must be 2, which is what top2_gate chooses, got 1"),
    "eps": ({"eps": -1.0}, "eps must be a number from 0 to inf, got -1.0"),
    "dropout": ({"dropout": 1.5}, "SparseMLP: dropout must be a number from 0 to 1, got 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        SparseMLP(**{"hidden_size": 8, "ffn_size": 6, "num_experts": 4, "top_k": 2, **change})


def test_wrong_parts() -> None:
    with pytest.raises(ValueError, match=r"the router's num_experts must be the experts' \(3\), got 4"):
        SparseMLP(TopKRouter(8, 4, 2), GroupedExperts(8, 6, 3))
    with pytest.raises(ValueError, match=r"the router's hidden_size must be the experts' \(8\), got 16"):
        SparseMLP(TopKRouter(16, 4, 2), GroupedExperts(8, 6, 4))
    with pytest.raises(ValueError, match="scoring must be 'sparsemixer', got 'softmax'"):
        SparsemixerRouter(8, 4, scoring="softmax")
    for arguments, message in (
        ({"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({"num_experts": 3, "capacity": 0}, "capacity must be a positive integer, got 0"),
        ({"num_experts": 3, "group_size": 4}, "group_size must be None without a capacity, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalDispatcher(**arguments)


def test_wrong_inputs() -> None:
    mlp = SparseMLP(8, 6, 4, 2)
    with pytest.raises(ValueError, match=r"TopKRouter: hidden must be \[\.\.\., 8\], got \[6, 9\]"):
        mlp(torch.randn(2, 3, 9))
    with pytest.raises(ValueError, match=r"mask must have one entry per token \[2, 3\], got \[4\]"):
        mlp(torch.randn(2, 3, 8), torch.ones(4))


def test_made_from_parts_or_from_sizes() -> None:
    sizes = SparseMLP(hidden_size=8, ffn_size=6, num_experts=4, top_k=2, renormalize=True, activation="relu")
    router, experts = TopKRouter(8, 4, 2, renormalize=True), GroupedExperts(8, 6, 4, activation="relu")
    parts = SparseMLP(router=router, experts=experts)
    parts.load_state_dict(sizes.state_dict())
    hidden = torch.randn(3, 8)
    assert torch.equal(parts(hidden)[0], sizes(hidden)[0])
    assert parts.router is router and parts.experts is experts
    assert [name for name, _ in parts.named_parameters()] == [
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    ]


def test_the_router_by_its_name_in_checkpoints() -> None:
    layer = SparseMLP(8, 6, 4, 2)
    model = torch.nn.ModuleDict({"mlp": SparseMLP(8, 6, 4, 2)})
    state = {f"mlp.{name.replace('router', 'gate')}": tensor for name, tensor in layer.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model["mlp"].router.weight, layer.router.weight)
    assert "mlp.gate.weight" in state


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("output_dropout", [0.0, 0.3])
def test_dropout_in_training(dropout: float, output_dropout: float) -> None:
    mlp = SparseMLP(8, 6, 4, 2, dropout=dropout, output_dropout=output_dropout)
    hidden = torch.randn(5, 8)
    _, routing_weights, expert_ids = mlp.router(hidden)
    plan = ops.plan(expert_ids, 4)
    torch.manual_seed(3)
    rows = hidden[plan.token_of_row.long()]
    inner = ops.grouped_gemm(rows, mlp.experts.gate_up_proj, plan.expert_offsets, activation="silu", gated=True)
    rows = ops.grouped_gemm(F.dropout(inner, dropout), mlp.experts.down_proj, plan.expert_offsets)
    rows = F.dropout(rows, output_dropout)
    expected = (rows[plan.row_of_slot.long()] * routing_weights[..., None]).sum(1)
    torch.manual_seed(3)
    torch.testing.assert_close(mlp(hidden)[0], expected)
    plain = SparseMLP(8, 6, 4, 2)
    plain.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp.eval()(hidden)[0], plain(hidden)[0])


def test_activation_names() -> None:
    assert op_activation("gelu_pytorch_tanh") == op_activation("gelu_new") == "gelu_tanh"
    assert op_activation("swish") == "silu"
    with pytest.raises(ValueError, match="unknown activation 'selu', expected one of relu, gelu"):
        op_activation("selu")


def test_shared_experts() -> None:
    shared = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.SiLU(), torch.nn.Linear(24, 16))
    torch.manual_seed(0)
    mlp = SparseMLP(16, 12, 4, 2, shared_experts=shared)
    torch.manual_seed(0)
    routed = SparseMLP(16, 12, 4, 2)
    hidden, mask = torch.randn(3, 5, 16), torch.rand(3, 5) > 0.3
    torch.testing.assert_close(mlp(hidden)[0], routed(hidden)[0] + shared(hidden))
    out = mlp(hidden, mask)[0]
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], (routed(hidden)[0] + shared(hidden))[mask])
    composed = SparseMLP(routed.router, routed.experts, shared_experts=shared)
    torch.testing.assert_close(composed(hidden)[0], mlp(hidden)[0])
    assert "shared_experts.0.weight" in mlp.state_dict() and "shared_experts" not in str(list(routed.state_dict()))
