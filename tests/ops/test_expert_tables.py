"""Weights and biases as sequences of tensors: the bits of the stack, and gradients of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import moekernels
from moekernels import ops
from tests.generators import SMALL_LAYERS, LayerInputs, LayerShape, layer_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("up_weight", "down_weight", "up_bias", "down_bias")


def scattered(part: Tensor, index: int) -> Tensor:
    """The same values in memory of their own: dense, padded, misaligned, transposed, backwards or every other one."""
    *outer, width = part.shape
    kind = index % 5
    if kind == 1 and outer:
        return torch.cat([part, torch.full_like(part, float("nan"))], dim=-1)[..., :width]
    if kind == 2:
        return torch.cat([part.new_full((1 + index % 3,), float("nan")), part.flatten()])[1 + index % 3 :].view_as(part)
    if kind == 3 and outer:
        return part.t().contiguous().t()
    if kind == 4:
        return torch.stack([part, torch.full_like(part, float("nan"))], dim=-1)[..., 0]
    return part.clone()


def table(stack: Tensor, num_parts: int) -> list[Tensor]:
    """As ``E * P`` tensors that lie anywhere."""
    parts = stack.detach().unflatten(1, (num_parts, -1)).flatten(0, 1).unbind()
    return [scattered(part, i) for i, part in enumerate(parts)]


def stack_of(parts: list[Tensor], num_experts: int) -> Tensor:
    return torch.cat(parts).unflatten(0, (num_experts, -1))


@dataclass
class Tables:
    up_weight: list[Tensor]
    down_weight: list[Tensor]
    up_bias: list[Tensor] | None
    down_bias: list[Tensor] | None

    @classmethod
    def of(cls, x: LayerInputs, up_parts: int, down_parts: int = 1) -> Tables:
        return cls(
            table(x.up_weight, up_parts),
            table(x.down_weight, down_parts),
            None if x.up_bias is None else table(x.up_bias, up_parts),
            None if x.down_bias is None else table(x.down_bias, down_parts),
        )

    def leaves(self) -> list[Tensor]:
        return [leaf for name in NAMES for leaf in getattr(self, name) or ()]


def run(x: LayerInputs, experts: LayerInputs | Tables, plan: ops.Plan, shape: LayerShape, **options: bool) -> Tensor:
    given = {name: getattr(experts, name) for name in NAMES}
    return ops.sparse_mlp(
        x.hidden, x.routing_weights, plan, **given, activation=shape.activation, gated=shape.gated, **options
    )


def parts_that_fit(shape: LayerShape) -> list[tuple[int, int]]:
    """P of the up- and of the down-projection."""
    up = shape.ffn_size * (2 if shape.gated else 1)
    wanted = [(1, 1), (2, 1), (2, 2), (4, 1), (3, 3), (38, 37)]
    return [
        (p, q)
        for p, q in wanted
        if up % p == 0 and shape.hidden_size % q == 0 and (not shape.gated or p == 1 or p % 2 == 0)
    ]


LAYERS = [(shape, parts) for shape in SMALL_LAYERS for parts in parts_that_fit(shape)]


@pytest.mark.parametrize("isa", moekernels.build_info()["cpu_isas"])
@pytest.mark.parametrize("num_tokens", [1, 21, 130])
@pytest.mark.parametrize(("shape", "parts"), LAYERS, ids=str)
def test_has_the_bits_of_the_stack(shape: LayerShape, parts: tuple[int, int], num_tokens: int, isa: str) -> None:
    with moekernels.cpu_isa(isa):
        for dtype in DTYPES:
            x = layer_inputs(shape, num_tokens, dtype)
            plan = ops.plan(x.expert_ids, shape.num_experts)
            assert torch.equal(run(x, Tables.of(x, *parts), plan, shape), run(x, x, plan, shape))


def test_on_a_device(device: torch.device) -> None:
    shape = SMALL_LAYERS[4]
    x = layer_inputs(shape, 40, torch.bfloat16, device)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    torch.testing.assert_close(run(x, Tables.of(x, 3, 2), plan, shape), run(x, x, plan, shape))


@pytest.mark.parametrize("isa", moekernels.build_info()["cpu_isas"])
@pytest.mark.parametrize(("shape", "parts"), LAYERS, ids=str)
def test_gradients_are_those_of_the_stack(shape: LayerShape, parts: tuple[int, int], isa: str) -> None:
    x = layer_inputs(shape, 21, torch.float32)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    direction = torch.randn_like(x.hidden)
    inputs = [x.hidden.requires_grad_(), x.routing_weights.requires_grad_()]
    stacks = [getattr(x, name).requires_grad_() for name in NAMES if getattr(x, name) is not None]
    tables = Tables.of(x, *parts)
    leaves = [leaf.requires_grad_() for leaf in tables.leaves()]
    with moekernels.cpu_isa(isa):
        expected = torch.autograd.grad(run(x, x, plan, shape), [*inputs, *stacks], direction)
        out = run(x, tables, plan, shape, zero_unvisited=True)
        actual = torch.autograd.grad(out, [*inputs, *leaves], direction)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(a, b)
    grads = iter(actual[2:])
    for stack, name in zip(expected[2:], (name for name in NAMES if getattr(x, name) is not None), strict=True):
        parts_of = [next(grads) for _ in getattr(tables, name)]
        assert [g.shape for g in parts_of] == [leaf.shape for leaf in getattr(tables, name)]
        assert torch.equal(stack_of(parts_of, shape.num_experts), stack)


OFFSETS = torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32)


def gemm_inputs(num_parts: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias for OFFSETS, whose second expert has no rows; the last two rows belong to nobody."""
    torch.manual_seed(0)
    return torch.randn(11, 10), torch.randn(4, num_parts * rows, 10), torch.randn(4, num_parts * rows)


@pytest.mark.parametrize("isa", moekernels.build_info()["cpu_isas"])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("gathered", [False, True])
def test_grouped_gemm(isa: str, num_parts: int, gathered: bool) -> None:
    rows, weight, bias = gemm_inputs(num_parts)
    tokens = torch.randint(0, 11, (11,), dtype=torch.int32) if gathered else None
    parts = table(weight, num_parts)
    direction = torch.randn(11, weight.shape[1])
    with moekernels.cpu_isa(isa):
        for options in (dict(bias=True), dict(activation="gelu"), dict(scaled=True)):
            given = {"token_of_row": tokens, "activation": options.get("activation", "none")}
            if "scaled" in options:
                given["row_scale"] = torch.rand(11)
            leaves = [leaf.detach().requires_grad_() for leaf in (rows, weight, bias)]
            split = [[p.detach().requires_grad_() for p in ps] for ps in (parts, table(bias, num_parts))]
            with_bias = "bias" in options
            out = ops.grouped_gemm(leaves[0], leaves[1], OFFSETS, bias=leaves[2] if with_bias else None, **given)
            of_table = ops.grouped_gemm(
                leaves[0], split[0], OFFSETS, bias=split[1] if with_bias else None, **given, zero_unvisited=True
            )
            assert torch.equal(of_table, out)
            wanted = leaves if with_bias else leaves[:2]
            expected = torch.autograd.grad(out, wanted, direction)
            actual = torch.autograd.grad(of_table, [leaves[0], *split[0], *(split[1] if with_bias else [])], direction)
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(stack_of(list(actual[1 : 1 + len(parts)]), 4), expected[1])
            if with_bias:
                assert torch.equal(stack_of(list(actual[1 + len(parts) :]), 4), expected[2])
        rows = torch.randn(11, weight.shape[1])
        assert torch.equal(
            ops.grouped_gemm(rows, parts, OFFSETS, transposed=True),
            ops.grouped_gemm(rows, weight, OFFSETS, transposed=True),
        )


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_stack_of_biases_beside_a_table(num_parts: int) -> None:
    rows, weight, bias = gemm_inputs(num_parts)
    out = ops.grouped_gemm(rows, table(weight, num_parts), OFFSETS, bias=bias, gated=True, activation="silu")
    assert torch.equal(out, ops.grouped_gemm(rows, weight, OFFSETS, bias=bias, gated=True, activation="silu"))


def unvisited_grads(zero_unvisited: bool, wrap: Callable = lambda f: f) -> list[Tensor | None]:
    rows, weight, bias = gemm_inputs(2)
    leaves = [p.requires_grad_() for p in (*table(weight, 2), *table(bias, 2))]

    def function(rows: Tensor, *leaves: Tensor) -> Tensor:
        return ops.grouped_gemm(
            rows, leaves[:8], OFFSETS, bias=leaves[8:], gated=True, activation="silu", zero_unvisited=zero_unvisited
        )

    out = wrap(function)(rows, *leaves)
    return list(torch.autograd.grad(out.sum(), leaves, allow_unused=True))


def test_an_expert_without_rows_has_no_gradient() -> None:
    grads = unvisited_grads(False)
    assert [i for i, grad in enumerate(grads) if grad is None] == [2, 3, 10, 11]
    zeros = unvisited_grads(True)
    for grad, zero in zip(grads, zeros, strict=True):
        assert torch.equal(zero, torch.zeros_like(zero)) if grad is None else torch.equal(zero, grad)


def test_in_compiled_code_it_has_zeros() -> None:
    compiled = unvisited_grads(False, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    for grad, expected in zip(compiled, unvisited_grads(True), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("frozen", [{0}, {4, 5}, {0, 1, 4}, set(range(6)), {1, 3, 5, 7}, set(range(16)) - {5}], ids=str)
@pytest.mark.parametrize("zero_unvisited", [False, True])
def test_some_are_frozen(frozen: set[int], zero_unvisited: bool) -> None:
    rows, weight, bias = gemm_inputs(2)
    tokens = torch.randint(0, 5, (11,), dtype=torch.int32)
    direction = torch.randn(11, 12)

    def grads(frozen: set[int]) -> list[Tensor | None]:
        leaves = [p.requires_grad_(i not in frozen) for i, p in enumerate([*table(weight, 2), *table(bias, 2)])]
        hidden = rows[:5].detach().requires_grad_()
        out = ops.grouped_gemm(
            hidden, leaves[:8], OFFSETS, bias=leaves[8:], token_of_row=tokens, zero_unvisited=zero_unvisited
        )
        out.backward(direction)
        return [hidden.grad, *(leaf.grad for leaf in leaves)]

    every, some = grads(set()), grads(frozen)
    assert torch.equal(some[0], every[0])
    for i, (grad, expected) in enumerate(zip(some[1:], every[1:], strict=True)):
        if i in frozen or expected is None:
            assert grad is None
        else:
            assert torch.equal(grad, expected)


def test_no_row_at_all() -> None:
    rows, weight, _ = gemm_inputs(2)
    leaves = [p.requires_grad_() for p in table(weight, 2)]
    nobody = torch.zeros(5, dtype=torch.int32)
    out = ops.grouped_gemm(rows.requires_grad_(), leaves, nobody)
    assert torch.equal(out, torch.zeros(11, 12))
    out.sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows)) and all(leaf.grad is None for leaf in leaves)


def test_gradients_accumulate_and_step() -> None:
    """Gradients share a buffer; what is done to one leaves the others alone."""
    rows, weight, _ = gemm_inputs(2)
    leaves = [torch.nn.Parameter(p) for p in table(weight, 2)]
    for _ in range(2):
        ops.grouped_gemm(rows, leaves, OFFSETS).sum().backward()
    expected = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    leaves[0].grad.zero_()
    for leaf, grad in zip(leaves[1:], expected[1:], strict=True):
        assert grad is None if leaf.grad is None else torch.equal(leaf.grad, grad)
    torch.optim.AdamW(leaves, lr=0.1).step()
    assert torch.equal(leaves[2], table(weight, 2)[2])  # nobody visited it


def test_under_autocast() -> None:
    rows, weight, bias = gemm_inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.grouped_gemm(rows, table(weight, 2), OFFSETS, bias=table(bias, 2))
        assert out.dtype == torch.bfloat16 and torch.equal(out, ops.grouped_gemm(rows, weight, OFFSETS, bias=bias))


W = [torch.zeros(4, 10) for _ in range(8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=[]), "weight must be one stack .* or a sequence of matrices, got an empty sequence"),
        (dict(weight=W[:7]), "weight must have as many matrices for each of the 4 experts, got 7"),
        (dict(weight=[*W[:7], torch.zeros(5, 10)]), r"weight\[7\] must have shape .* = \[4, 10\], got \[5, 10\]"),
        (dict(weight=[*W[:7], W[0].half()]), r"weight\[7\] must be float32 like rows, got float16"),
        (dict(weight=[W[0].view(1, 4, 10), *W[1:]]), r"weight\[0\] must have 2 dimensions"),
        (dict(weight=[*W[:3], W[3][0], *W[4:]]), r"weight\[3\] must have 2 dimensions"),
        (dict(weight=[*W, *W[:4]], gated=True), "1 or an even number of matrices for each expert, got 3"),
        (
            dict(bias=[torch.zeros(4)] * 4),
            "bias must be one stack .* or 8 vectors, as many as weight has matrices, got 4",
        ),
        (dict(bias=[torch.zeros(4)] * 7 + [torch.zeros(3)]), r"bias\[7\] must have shape .* = \[4\], got \[3\]"),
        (dict(expert_offsets=OFFSETS[:1]), "expert_offsets must have at least 2 elements"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::grouped_gemm: .*{message}"):
        ops.grouped_gemm(**{"rows": torch.zeros(9, 10), "weight": W, "expert_offsets": OFFSETS, **arguments})
