"""The ops as torch sees them: schemas, shape functions, compilation."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from moekernels import ops
from tests.generators import SMALL_LAYERS, layer_inputs

SHAPE = SMALL_LAYERS[0]


def samples() -> dict[str, tuple]:
    x = layer_inputs(SHAPE, 6)
    plan = ops.plan(x.expert_ids, SHAPE.num_experts, capacity=2)
    rows, wide = torch.randn(12, 64), torch.randn(12, 32)
    layout = ops.quantize(torch.randn(8, 4, 64), "nf4", double_quant=True).kernel_layout
    assert layout is not None
    logits, scale = torch.randn(6, 8), torch.rand(12)
    weights, expert_ids = ops.route(logits, 2)
    layer = (x.hidden, x.routing_weights, *plan, [x.up_weight], [x.down_weight], [], [])
    up, down = list(x.up_weight.unflatten(1, (2, -1)).flatten(0, 1)), list(x.down_weight)
    table = (*layer[:5], up, down, [torch.randn(32) for _ in up], [torch.randn(64) for _ in down])
    return {
        "route": (logits, 2),
        "plan": (x.expert_ids, 8, 3, 2, torch.randperm(6).int()),
        "permute": (x.hidden, plan.token_of_row),
        "grouped_gemm": (rows, [x.up_weight], plan.expert_offsets, [], "silu", True, scale),
        "grouped_gemm of a table": (
            rows,
            up,
            plan.expert_offsets,
            [],
            "silu",
            True,
            scale,
            None,
            False,
            False,
            False,
            True,
        ),
        "unpermute": (rows, plan.row_of_slot, x.routing_weights),
        "activation": (rows, "silu", True),
        "linear": (rows.view(3, 4, 64), torch.randn(5, 64), torch.randn(5), "gelu"),
        "rms_norm": (rows.view(3, 4, 64), torch.randn(64), 1e-5),
        "attention": (torch.randn(4, 6, 2, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), 0.3),
        "quantized_gemm": (
            rows,
            *layout[:2],
            layout.tables,
            layout.order,
            layout.group,
            layout.unit,
            4,
            plan.expert_offsets,
            torch.randn(8, 4),
            "silu",
            True,
            scale,
        ),
        "route_by_score": (logits, 2, "sigmoid", torch.randn(8), 4, 2, True, 2.5, torch.rand(6) > 0.3),
        "transpose": (logits,),
        "router_stats": (logits, 3, 2, torch.ones(6)),
        "sparse_mlp": layer,
        "sparse_mlp_train": layer,
        "sparse_mlp of a table": table,
        "sparse_mlp_train of a table": (*table, "silu", True, False, False, True),
        "route_grad": (weights, logits, expert_ids),
        "router_stats_grad": (torch.randn(3, 8), torch.randn(3), logits),
        "unpermute_grad": (x.hidden, rows, plan.row_of_slot, plan.token_of_row, x.routing_weights),
        "activation_grad": (wide, rows, "silu", True, scale, plan.expert_offsets),
        "grouped_weight_grad": (rows[:, :24], rows, plan.expert_offsets, None, None, scale, True),
    }


# Ops with a gradient, and ops that are only called where none is wanted, or are gradients themselves.
DIFFERENTIABLE = (
    "route", "permute", "grouped_gemm", "grouped_gemm of a table", "unpermute", "activation", "router_stats",
    "sparse_mlp_train", "sparse_mlp_train of a table",
)  # fmt: skip
OTHERS = (
    "plan", "sparse_mlp", "sparse_mlp of a table", "linear", "quantized_gemm", "rms_norm", "attention",
    "route_by_score", "transpose", "route_grad", "router_stats_grad", "unpermute_grad", "activation_grad",
    "grouped_weight_grad",
)  # fmt: skip


def operator(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.moekernels, op.split()[0]).default


@pytest.mark.parametrize("op", DIFFERENTIABLE + OTHERS)
def test_opcheck_in_inference(op: str) -> None:
    torch.library.opcheck(operator(op), samples()[op])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_opcheck_in_training(op: str) -> None:
    """Also that the backward pass can be traced, for any number of tokens, and then computes the same."""
    arguments = pytree.tree_map_only(torch.Tensor, lambda a: a.requires_grad_(a.is_floating_point()), samples()[op])
    torch.library.opcheck(operator(op), arguments)


@pytest.mark.parametrize("op", DIFFERENTIABLE + OTHERS)
def test_the_meta_device(op: str) -> None:
    """Results and gradients are there as on the CPU, but for the values."""

    def run(device: str) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
        arguments = pytree.tree_map_only(torch.Tensor, lambda a: a.to(device), samples()[op])
        leaves = [a for a in pytree.tree_leaves(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]
        for leaf in leaves if op in DIFFERENTIABLE else ():
            leaf.requires_grad_()
        results = operator(op)(*arguments)
        found = [results] if isinstance(results, torch.Tensor) else list(results)
        wanted = [x for x in found if x.requires_grad]
        if wanted:
            grads = torch.autograd.grad(wanted, leaves, [torch.ones_like(x) for x in wanted], allow_unused=True)
            found += [grad for grad in grads if grad is not None]
        assert all(x.device.type == device for x in found)
        return [(x.shape, x.stride(), x.dtype) for x in found]

    assert run("meta") == run("cpu")


def test_every_op_is_checked() -> None:
    named = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "moekernels" in name
    }
    assert named == {op.split()[0] for op in DIFFERENTIABLE + OTHERS}


def layer(hidden: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    weights, expert_ids = ops.route(logits, 2, renormalize=True)
    plan = ops.plan(expert_ids, up.shape[0], capacity=max(1, hidden.shape[0] // 2))
    return ops.sparse_mlp(hidden, weights, plan, up, down)


def test_compiles_without_graph_breaks_or_recompilation() -> None:
    x = layer_inputs(SHAPE, 6)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (6, 9, 2, 31):
            hidden, logits = torch.randn(num_tokens, 64), torch.randn(num_tokens, 8)
            expected = layer(hidden, logits, x.up_weight, x.down_weight)
            assert torch.equal(compiled(hidden, logits, x.up_weight, x.down_weight), expected)


def test_errors_are_those_of_the_op_when_it_is_called_directly() -> None:
    with pytest.raises(RuntimeError, match="moekernels::permute: hidden must have 2 dimensions"):
        torch.ops.moekernels.permute(torch.zeros(3), torch.zeros(3, dtype=torch.int32))


def test_half_precision_is_rounded_once() -> None:
    """The sum of 300 equal products is exact in float32 and would stall at 256 in bfloat16."""
    rows = torch.ones(1, 300, dtype=torch.bfloat16)
    out = ops.grouped_gemm(rows, torch.ones(1, 1, 300, dtype=torch.bfloat16), torch.tensor([0, 1], dtype=torch.int32))
    assert out.item() == 300.0
