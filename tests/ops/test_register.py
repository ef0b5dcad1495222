"""The ops as torch sees them: schemas, shape functions, compilation."""

from __future__ import annotations

import pytest
import torch

from moekernels import ops
from tests.generators import SMALL_LAYERS, layer_inputs

SHAPE = SMALL_LAYERS[0]


def samples() -> dict[str, tuple]:
    x = layer_inputs(SHAPE, 6)
    plan = ops.plan(x.expert_ids, SHAPE.num_experts)
    rows = torch.randn(12, 64)
    logits = torch.randn(6, 8)
    return {
        "route": (logits, 2),
        "plan": (x.expert_ids, 8, 3, 2, torch.randperm(6).int()),
        "permute": (x.hidden, plan.token_of_row),
        "grouped_gemm": (rows, x.up_weight, plan.expert_offsets, None, "silu", True, torch.rand(12)),
        "grouped_weight_grad": (rows[:, :24], rows, plan.expert_offsets, None, None, torch.rand(12), True),
        "unpermute": (rows, plan.row_of_slot, x.expert_weights),
        "sparse_mlp": (x.hidden, x.expert_weights, *plan, x.up_weight, x.down_weight),
    }


@pytest.mark.parametrize(
    "op", ["route", "plan", "permute", "grouped_gemm", "grouped_weight_grad", "unpermute", "sparse_mlp"]
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(op: str, grad: bool) -> None:
    arguments = samples()[op]
    if grad:
        arguments = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
        )
    # Tracing the backward pass needs backward kernels: the definition's loop over experts reads the offsets.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.moekernels, op).default, arguments, test_utils=checks)


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
