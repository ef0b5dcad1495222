"""Operands that no kernel may read: of another device, or of a class that is not its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moekernels import ops

PLAN = ops.plan(torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=torch.int32), 4)
ROWS, SLOTS = torch.ones(6, 8), PLAN.row_of_slot
UP, DOWN = [torch.ones(4, 8) for _ in range(8)], torch.ones(4, 8, 4)
MANY = torch.ones(300, 8)

# Every op with all its tensors, by name; the first says on which device the others must be.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "route": (ops.route, dict(logits=torch.ones(3, 4), top_k=2, mask=torch.ones(3, dtype=torch.bool))),
    "route, noise": (
        ops.route, dict(logits=torch.ones(3, 4), top_k=2, scoring="top2_gate", noise=torch.ones(3, 4)),
    ),
    "plan": (ops.plan, dict(expert_ids=torch.zeros(3, 2).int(), num_experts=4, priority=torch.ones(3))),
    "permute": (ops.permute, dict(hidden=torch.ones(3, 8), token_of_row=PLAN.token_of_row, row_of_slot=SLOTS)),
    "unpermute": (ops.unpermute, dict(rows=ROWS, row_of_slot=SLOTS, routing_weights=torch.ones(3, 2))),
    "grouped_gemm": (
        ops.grouped_gemm,
        dict(
            rows=torch.ones(3, 8), weight=UP, expert_offsets=PLAN.expert_offsets, bias=[torch.ones(4)] * 8,
            row_scale=torch.ones(6), token_of_row=PLAN.token_of_row,
        ),
    ),
    "grouped_gemm, stack": (
        ops.grouped_gemm,
        dict(rows=ROWS, weight=torch.ones(4, 5, 8), expert_offsets=PLAN.expert_offsets, bias=torch.ones(4, 5)),
    ),
    "grouped_weight_grad": (
        ops.grouped_weight_grad,
        dict(
            grad_rows=torch.ones(3, 5), rows=torch.ones(3, 8), expert_offsets=PLAN.expert_offsets,
            grad_token_of_row=PLAN.token_of_row, token_of_row=PLAN.token_of_row, bias_scale=torch.ones(6),
        ),
    ),
    "activation": (ops.activation, dict(linear=ROWS, activation="silu")),
    "router_stats": (ops.router_stats, dict(logits=torch.ones(3, 4), top_k=2, mask=torch.ones(3))),
    "sparse_mlp": (
        ops.sparse_mlp,
        dict(
            hidden=torch.ones(3, 8), routing_weights=torch.ones(3, 2), plan=PLAN, up_weight=UP, down_weight=DOWN,
            up_bias=[torch.ones(4)] * 8, down_bias=torch.ones(4, 8),
        ),
    ),
    "linear": (ops.linear, dict(input=torch.ones(3, 8), weight=torch.ones(5, 8), bias=torch.ones(5))),
    "linear, many rows": (ops.linear, dict(input=MANY, weight=torch.ones(5, 8), bias=torch.ones(5))),
    "rms_norm": (ops.rms_norm, dict(input=ROWS, weight=torch.ones(8))),
    "attention": (
        ops.attention,
        dict(query=torch.ones(1, 2, 3, 4), key=torch.ones(1, 2, 5, 4), value=torch.ones(1, 2, 5, 4), scale=1.0),
    ),
}  # fmt: skip


def tensors_of(arguments: dict[str, Any]) -> list[tuple[str, int]]:
    """Each tensor but the first: the argument it is in, and its place there. Of lists the first and the last."""
    found = []
    for name, value in list(arguments.items())[1:]:
        leaves = pytree.tree_leaves(value)
        places = range(len(leaves)) if name == "plan" else sorted({0, len(leaves) - 1})
        found += [(name, i) for i in places if isinstance(leaves[i], Tensor)]
    return found


def replaced(arguments: dict[str, Any], name: str, place: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    leaves, spec = pytree.tree_flatten(arguments[name])
    leaves[place] = change(leaves[place])
    return {**arguments, name: pytree.tree_unflatten(leaves, spec)}


def argument_of_op(name: str, place: int) -> str:
    """How a message calls it: the fields of a plan are arguments of the registered op, a priority becomes an order."""
    return ops.Plan._fields[place] if name == "plan" else {"priority": "token_order"}.get(name, name)


EACH = [(call, *where) for call, (_, arguments) in CALLS.items() for where in tensors_of(arguments)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("call", "name", "place"), EACH)
def test_an_operand_on_the_meta_device(call: str, name: str, place: int, training: bool) -> None:
    op, arguments = CALLS[call]
    first = next(iter(arguments))
    if training:
        if not arguments[first].is_floating_point():
            return
        arguments = {**arguments, first: arguments[first].clone().requires_grad_()}
    argument = argument_of_op(name, place)
    with pytest.raises(ValueError, match=f"moekernels::{call.split(',')[0]}: {argument}.* must be on cpu like"):
        op(**replaced(arguments, name, place, lambda x: x.to("meta")))


@pytest.mark.parametrize(("call", "name", "place"), EACH)
def test_one_operand_beside_the_meta_device(call: str, name: str, place: int) -> None:
    op, arguments = CALLS[call]
    on_meta = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), arguments)
    with pytest.raises(ValueError, match=f"moekernels::{call.split(',')[0]}: .* must be on meta like"):
        op(**replaced(on_meta, name, place, lambda x: torch.ones(x.shape, dtype=x.dtype)))


@pytest.mark.parametrize("call", CALLS)
def test_all_on_the_meta_device(call: str) -> None:
    op, arguments = CALLS[call]
    out = op(**pytree.tree_map_only(Tensor, lambda x: x.to("meta"), arguments))
    for x, y in zip(pytree.tree_leaves(out), pytree.tree_leaves(op(**arguments)), strict=True):
        assert x.is_meta and x.shape == y.shape and x.dtype == y.dtype


class Packed(Tensor):
    """A stand-in for quantised weights: a wrapper that only knows some of torch's own operators."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data: Tensor) -> None:
        self.inner = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unpacked = pytree.tree_map_only(Packed, lambda x: x.inner, args)
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*unpacked)
        raise NotImplementedError(f"no rule for {func}")


class Encoded(Tensor):
    """Ordinary memory that holds half of what it means: functions know, kernels would not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            args = [2 * x.as_subclass(Tensor) if isinstance(x, Encoded) else x for x in args]
        return super().__torch_function__(func, types, args, kwargs or {})


class Named(Tensor):
    """A class of a user's that changes nothing."""


@pytest.mark.parametrize("pack", [Packed, lambda x: x.as_subclass(Encoded)], ids=["Packed", "Encoded"])
@pytest.mark.parametrize("name", ["up_weight", "down_weight", "up_bias", "down_bias"])
def test_a_weight_of_another_class(name: str, pack: Callable[[Tensor], Tensor]) -> None:
    op, arguments = CALLS["sparse_mlp"]
    message = f"moekernels::sparse_mlp: {name} must hold plain tensors, got a (Packed|Encoded)"
    with pytest.raises(ValueError, match=message):
        op(**replaced(arguments, name, len(pytree.tree_leaves(arguments[name])) - 1, pack))
    op, arguments = CALLS["grouped_gemm, stack"]
    with pytest.raises(ValueError, match="moekernels::grouped_gemm: weight must hold plain tensors"):
        op(**replaced(arguments, "weight", 0, pack))


@pytest.mark.parametrize("num_rows", [1, 300])
def test_linear_leaves_such_a_weight_to_torch(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 8), torch.randn(5, 8)
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(ops.linear(x, Packed(weight)), expected)
    torch.testing.assert_close(ops.linear(x, weight.as_subclass(Encoded)).as_subclass(Tensor), 2 * expected)


@pytest.mark.parametrize("kind", [lambda x: x.as_subclass(Named), torch.nn.Parameter], ids=["Named", "Parameter"])
def test_ordinary_classes_pass(kind: Callable[[Tensor], Tensor]) -> None:
    op, arguments = CALLS["sparse_mlp"]
    out = op(**replaced(arguments, "down_weight", 0, kind)).detach().as_subclass(Tensor)
    assert torch.equal(out, op(**arguments))
