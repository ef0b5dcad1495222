from __future__ import annotations

import pytest
import torch

from moekernels import ops
from moekernels.ops import reference
from tests.generators import REAL_LAYERS, ROUTINGS, SMALL_LAYERS, LayerInputs, LayerShape, layer_inputs
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(module: object, x: LayerInputs, plan: ops.Plan, shape: LayerShape) -> torch.Tensor:
    return module.sparse_mlp(
        x.hidden,
        x.routing_weights,
        plan,
        x.up_weight,
        x.down_weight,
        up_bias=x.up_bias,
        down_bias=x.down_bias,
        activation=shape.activation,
        gated=shape.gated,
    )


def size_of_terms(x: LayerInputs, plan: ops.Plan, shape: LayerShape) -> float:
    """The largest sum of |weight * row|: what the weighted sum would be if nothing cancelled."""
    x = x.to(torch.float64)
    inner = reference.grouped_gemm(
        x.hidden,
        x.up_weight,
        plan.expert_offsets,
        bias=x.up_bias,
        activation=shape.activation,
        gated=shape.gated,
        token_of_row=plan.token_of_row,
    )
    rows = reference.grouped_gemm(inner, x.down_weight, plan.expert_offsets, bias=x.down_bias)
    return reference.unpermute(rows.abs(), plan.row_of_slot, x.routing_weights).amax().item() if rows.numel() else 0.0


def plain(x: LayerInputs, plan: ops.Plan, shape: LayerShape) -> torch.Tensor:
    """The eager loop over experts with `index_add_`, in the dtype of the inputs, as the model libraries write it."""
    act = {"silu": torch.nn.functional.silu, "relu": torch.relu, "none": lambda y: y, "gelu": torch.nn.functional.gelu}
    act["gelu_tanh"] = lambda y: torch.nn.functional.gelu(y, approximate="tanh")
    out = torch.zeros_like(x.hidden)
    for e in range(shape.num_experts):
        kept = (x.expert_ids == e) & (plan.row_of_slot >= 0)
        tokens, slots = kept.nonzero(as_tuple=True)
        y = torch.nn.functional.linear(x.hidden[tokens], x.up_weight[e], None if x.up_bias is None else x.up_bias[e])
        y = act[shape.activation](y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if shape.gated else act[shape.activation](y)
        y = torch.nn.functional.linear(y, x.down_weight[e], None if x.down_bias is None else x.down_bias[e])
        out.index_add_(0, tokens, y * x.routing_weights[tokens, slots, None].to(y.dtype))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 19])
@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_small_layers(
    device: torch.device, shape: LayerShape, num_tokens: int, routing: str, dtype: torch.dtype
) -> None:
    x = layer_inputs(shape, num_tokens, dtype, device, routing)
    for capacity in (None, 3):
        plan = ops.plan(x.expert_ids, shape.num_experts, capacity=capacity)
        actual = run(ops, x, plan, shape)
        truth = run(reference, x.to(torch.float64), plan, shape)
        assert_accurate(actual, truth, plain(x, plan, shape), size_of_terms(x, plan, shape))
        assert torch.equal(actual, run(ops, x, plan, shape)), "the same input gives the same bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL_LAYERS, ids=str)
def test_real_layers(device: torch.device, shape: LayerShape, dtype: torch.dtype) -> None:
    """Real widths; few experts, so that the weights fit in float64 too."""
    shape = LayerShape(
        shape.name, shape.hidden_size, shape.ffn_size, 3, min(shape.top_k, 2),
        shape.activation, shape.gated, shape.bias,
    )  # fmt: skip
    x = layer_inputs(shape, 3, dtype, device)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    assert_accurate(run(ops, x, plan, shape), run(reference, x.to(torch.float64), plan, shape), plain(x, plan, shape))


def test_equals_the_chain_of_small_ops(device: torch.device) -> None:
    shape = SMALL_LAYERS[0]
    x = layer_inputs(shape, 21, torch.bfloat16, device)
    plan = ops.plan(x.expert_ids, shape.num_experts, capacity=4)
    rows = ops.permute(x.hidden, plan.token_of_row)
    inner = ops.grouped_gemm(rows, x.up_weight, plan.expert_offsets, activation="silu", gated=True)
    rows = ops.grouped_gemm(inner, x.down_weight, plan.expert_offsets)
    assert torch.equal(run(ops, x, plan, shape), ops.unpermute(rows, plan.row_of_slot, x.routing_weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: dict(hidden=x["hidden"][:4]), "row_of_slot must have one row per token, 4, got 5"),
        (lambda x: dict(hidden=x["hidden"][:, :9]), "hidden must have the hidden_size of up_weight, 64, got 9"),
        (lambda x: dict(hidden=x["hidden"].int()), "hidden must be float32, bfloat16 or float16, got int32"),
        (lambda x: dict(up_weight=x["up_weight"][0]), r"up_weight must have 3 dimensions .*, got 2"),
        (lambda x: dict(up_bias=torch.zeros(8, 3)), r"up_bias must have shape .* = \[8, 64\], got \[8, 3\]"),
        (lambda x: dict(down_bias=torch.zeros(8, 64).half()), "down_bias must be float32 like hidden, got float16"),
        (lambda x: dict(plan=x["plan"]._replace(token_of_row=torch.zeros(5))), "token_of_row must be int32"),
        (
            lambda x: dict(down_weight=x["up_weight"]),
            r"down_weight must have shape .* = \[8, 64, 32\], got \[8, 64, 64\]",
        ),
        (lambda x: dict(down_weight=x["down_weight"].half()), "down_weight must be float32 like hidden, got float16"),
        (lambda x: dict(routing_weights=x["routing_weights"].half()), "routing_weights must be float32, got float16"),
        (lambda x: dict(activation="swish"), "activation must be one of"),
    ],
)
def test_bad_input(change, message: str) -> None:  # type: ignore[no-untyped-def]
    x = layer_inputs(SMALL_LAYERS[0], 5)
    arguments = dict(
        hidden=x.hidden, routing_weights=x.routing_weights, plan=ops.plan(x.expert_ids, 8),
        up_weight=x.up_weight, down_weight=x.down_weight,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"moekernels::sparse_mlp: {message}"):
        ops.sparse_mlp(**{**arguments, **change(arguments)})
