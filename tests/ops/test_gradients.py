"""Gradients through the ops, against the float64 gradients of their definitions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekernels import ops
from moekernels.ops import reference
from moekernels.ops.activation import ACTIVATION_FUNCTIONS
from tests.generators import ROUTINGS, SMALL_LAYERS, LayerInputs, LayerShape, layer_inputs
from tests.ops.test_grouped_gemm import offsets_of
from tests.ops.test_grouped_gemm import plain as plain_grouped_gemm
from tests.ops.test_sparse_mlp import plain as plain_sparse_mlp
from tests.ops.test_sparse_mlp import run as run_layer
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    """The gradients of ``<function(*leaves), direction>``."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    if out.numel() == 0 and not out.requires_grad:  # a definition that found nothing to compute
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(out, leaves, direction.to(out.dtype), materialize_grads=True))


def check(
    op: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    leaves: list[Tensor],
    direction: Tensor,
    scale: float | None = None,
) -> list[Tensor]:
    """Compare the gradients; `scale` as in :func:`assert_accurate`.

    The first leaf has the dtype that is computed in; a float32 gradient that comes of half-precision rows is as
    accurate as they are. PyTorch's error in a handful of elements is chance: theirs counts as that of the others.
    """
    dtype = leaves[0].dtype
    direction = direction.to(dtype)
    actual = gradients(op, leaves, direction)
    truth = gradients(definition, [leaf.double() for leaf in leaves], direction)
    expected = [p.to(dtype) for p in gradients(plain, leaves, direction)]
    largest = [t.abs().max().item() if t.numel() else 0.0 for t in truth]
    off = [(p.double() - t).abs().max().item() if t.numel() else 0.0 for p, t in zip(expected, truth, strict=True)]
    others = max(error / most for error, most in zip(off, largest, strict=True) if most) if any(largest) else 0.0
    for a, t, p, leaf, most in zip(actual, truth, expected, leaves, largest, strict=True):
        assert a.dtype == leaf.dtype
        few = t.numel() < _FEW
        assert_accurate(a.to(dtype), t, (t + others * most).to(dtype) if few else p, scale)
    return actual


_FEW = 8


def tensors_of(x: LayerInputs) -> dict[str, Tensor]:
    """What of a layer has a gradient."""
    names = ("hidden", "routing_weights", "up_weight", "down_weight", "up_bias", "down_bias")
    return {name: getattr(x, name) for name in names if getattr(x, name) is not None}


def layer_of(run: Callable[..., Tensor], x: LayerInputs, plan: ops.Plan, shape: LayerShape) -> Callable[..., Tensor]:
    """The layer as a function of `tensors_of(x)`."""
    names = list(tensors_of(x))

    def function(*values: Tensor) -> Tensor:
        return run(LayerInputs(**{**vars(x), **dict(zip(names, values, strict=True))}), plan, shape)

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "routing"), [(0, "uniform"), (1, "uniform"), (23, "zipf"), (23, "one-expert")])
@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_sparse_mlp(device: torch.device, shape: LayerShape, num_tokens: int, routing: str, dtype: torch.dtype) -> None:
    """With experts that nobody chose, and choices that were dropped."""
    x = layer_inputs(shape, num_tokens, dtype, device, routing)
    plan = ops.plan(x.expert_ids, shape.num_experts, capacity=7)
    layers = [layer_of(run, x, plan, shape) for run in (partial(run_layer, ops), partial(run_layer, reference))]
    leaves = list(tensors_of(x).values())
    # The gradient of a weight has up to 7 terms of order one.
    check(*layers, layer_of(plain_sparse_mlp, x, plan, shape), leaves, torch.randn_like(x.hidden), scale=7**0.5)


@pytest.mark.parametrize("name", ["hidden", "routing_weights", "up_weight", "down_weight", "up_bias", "down_bias"])
def test_sparse_mlp_computes_only_what_is_asked_for(device: torch.device, name: str) -> None:
    """One gradient alone is the same, bit for bit, and comes of fewer products."""
    shape = LayerShape("biased", 16, 12, 4, 2, bias=True)
    x = layer_inputs(shape, 9, device=device)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    direction = torch.randn_like(x.hidden)
    tensors = tensors_of(x)
    everything = gradients(layer_of(partial(run_layer, ops), x, plan, shape), list(tensors.values()), direction)
    setattr(x, name, tensors[name].detach().requires_grad_())
    out = run_layer(ops, x, plan, shape)
    with CountCalls() as calls:
        (alone,) = torch.autograd.grad(out, getattr(x, name), direction)
    assert torch.equal(alone, everything[list(tensors).index(name)])
    products = calls.counts["grouped_gemm"], calls.counts.get("grouped_weight_grad", 0)
    assert products == {"hidden": (2, 0), "routing_weights": (2, 0)}.get(name, (1, 1))


class CountCalls(TorchDispatchMode):
    """Counts the ops of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "moekernels":
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_sparse_mlp_saves_the_up_projection_and_nothing_else() -> None:
    """In bfloat16 2TH + 4TKF bytes and the routing, besides the parameters."""
    shape, num_tokens = LayerShape("gated", 64, 48, 8, 2), 13
    x = layer_inputs(shape, num_tokens, torch.bfloat16)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    leaves = [leaf.requires_grad_() for leaf in tensors_of(x).values()]
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_layer(ops, x, plan, shape).sum().backward()
    for parameter in (x.up_weight, x.down_weight):
        del saved[parameter.untyped_storage().data_ptr()]
    routing = (x.routing_weights, *plan)
    rows = num_tokens * shape.top_k
    assert sum(tensor.nbytes for tensor in saved.values()) == (
        2 * num_tokens * shape.hidden_size
        + 4 * rows * shape.ffn_size
        + sum(tensor.nbytes for tensor in routing)
    )  # fmt: skip
    assert all(leaf.grad is not None for leaf in leaves)


def test_inference_takes_the_op_without_a_gradient() -> None:
    shape = SMALL_LAYERS[0]
    x = layer_inputs(shape, 5)
    plan = ops.plan(x.expert_ids, shape.num_experts)
    for wanted, op in ((True, "sparse_mlp_train"), (False, "sparse_mlp")):
        x.down_weight.requires_grad_()
        with CountCalls() as calls, torch.set_grad_enabled(wanted):
            run_layer(ops, x, plan, shape)
        assert calls.counts == {op: 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(("activation", "gated"), [("none", False), ("gelu", True), ("relu", False), ("silu", True)])
def test_grouped_gemm(
    device: torch.device, activation: str, gated: bool, scaled: bool, gather: bool, dtype: torch.dtype
) -> None:
    tokens = torch.tensor([3, 0, 3, -1, 2, 2, 2, 5, 0], dtype=torch.int32, device=device) if gather else None
    rows = torch.randn(6 if gather else 9, 20, device=device).to(dtype)
    weight, bias = (torch.randn(3, 14, 20, device=device) * 20**-0.5).to(dtype), torch.randn(3, 14).to(device, dtype)
    scale = [torch.rand(9, device=device) + 0.5] if scaled else []
    offsets = offsets_of([4, 0, 3], device)  # two rows past the end
    direction = torch.randn(9, 7 if gated else 14, device=device)

    def as_function(grouped_gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(rows: Tensor, weight: Tensor, bias: Tensor, row_scale: Tensor | None = None) -> Tensor:
            return grouped_gemm(
                rows, weight, offsets, bias=bias, activation=activation, gated=gated, row_scale=row_scale,
                token_of_row=tokens,
            )  # fmt: skip

        return function

    def plain(rows: Tensor, weight: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        if gather:
            rows, options["token_of_row"] = torch.cat((rows, rows.new_zeros(1, 20))), None
            rows = rows[tokens.long()]
        return plain_grouped_gemm(rows, weight, offsets, **options)

    functions = [as_function(f) for f in (ops.grouped_gemm, reference.grouped_gemm, plain)]
    check(*functions, [rows, weight, bias, *scale], direction, scale=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_grouped_gemm(device: torch.device, dtype: torch.dtype) -> None:
    rows, weight = torch.randn(9, 14, device=device).to(dtype), torch.randn(3, 14, 20, device=device).to(dtype)
    bias = torch.randn(3, 20, device=device).to(dtype)
    offsets, direction = offsets_of([4, 0, 3], device), torch.randn(9, 20, device=device)

    def plain(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        return plain_grouped_gemm(rows, weight.transpose(1, 2), offsets, bias=bias)

    for operands in ([rows, weight], [rows, weight, bias]):
        functions = [
            lambda rows, weight, bias=None, f=f: f(rows, weight, offsets, bias=bias, transposed=True)
            for f in (ops.grouped_gemm, reference.grouped_gemm, plain)
        ]
        check(*functions, operands, direction, scale=4.0)


def test_what_lies_past_the_last_row_has_no_influence(device: torch.device) -> None:
    rows, weight = torch.randn(8, 6, device=device), torch.randn(2, 10, 6, device=device)
    offsets, direction = offsets_of([2, 3], device), torch.randn(8, 5, device=device)
    row_scale = torch.rand(8, device=device)

    def function(rows: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
        return ops.grouped_gemm(rows, weight, offsets, activation="silu", gated=True, row_scale=row_scale)

    expected = gradients(function, [rows[:5], weight, row_scale[:5]], direction[:5])
    for x in (rows, direction, row_scale):
        x[5:] = float("nan")
    actual = gradients(function, [rows, weight, row_scale], direction)
    assert torch.equal(actual[1], expected[1])
    for i in (0, 2):
        assert torch.equal(actual[i][:5], expected[i]) and (actual[i][5:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_slots", [False, True], ids=["sorting", "with-slots"])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_permute(device: torch.device, num_tokens: int, with_slots: bool, dtype: torch.dtype) -> None:
    for width in (1, 7, 64):
        hidden = torch.randn(num_tokens, width, device=device).to(dtype)
        plan = ops.plan(ROUTINGS["zipf"](num_tokens, 5, 3, device), 5, capacity=4)
        slots = plan.row_of_slot if with_slots else None
        direction = torch.randn(3 * num_tokens, width, device=device)
        check(
            lambda x, plan=plan, slots=slots: ops.permute(x, plan.token_of_row, slots),
            lambda x, plan=plan: reference.permute(x, plan.token_of_row),
            lambda x, plan=plan: torch.cat((x, x.new_zeros(1, x.shape[1])))[plan.token_of_row.long()],
            [hidden],
            direction,
        )


def test_permute_by_any_index(device: torch.device) -> None:
    """Copies of a token in any number and order, and indices outside: each token gets the sum of its own."""
    index = torch.tensor([4, 4, -1, 0, 4, 9, 4, 0, -7], dtype=torch.int32, device=device)
    direction = torch.randn(9, 12, device=device)
    (grad,) = gradients(lambda x: ops.permute(x, index), [torch.randn(5, 12, device=device)], direction)
    expected = torch.zeros(5, 12, device=device)
    expected[4] = direction[[0, 1, 4, 6]].sum(0)
    expected[0] = direction[[3, 7]].sum(0)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_unpermute(device: torch.device, num_tokens: int, weighted: bool, dtype: torch.dtype) -> None:
    for width in (1, 7, 64):
        plan = ops.plan(ROUTINGS["zipf"](num_tokens, 5, 3, device), 5, capacity=4)
        rows = torch.randn(3 * num_tokens, width, device=device).to(dtype)
        weights = [torch.randn(num_tokens, 3, device=device)] if weighted else []

        def plain(rows: Tensor, weights: Tensor | None = None, plan: ops.Plan = plan) -> Tensor:
            taken = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[plan.row_of_slot.long()]
            return (taken if weights is None else taken * weights.to(rows.dtype).unsqueeze(-1)).sum(1)

        functions = [
            lambda *x, f=f, plan=plan: f(x[0], plan.row_of_slot, *x[1:]) for f in (ops.unpermute, reference.unpermute)
        ]
        direction = torch.randn(num_tokens, width, device=device)
        check(*functions, plain, [rows, *weights], direction, scale=width**0.5)


@pytest.mark.parametrize(
    "rule",
    [
        dict(),
        dict(renormalize=True),
        dict(probs_dtype=torch.bfloat16, renormalize=True),
        dict(scoring="top2_gate", renormalize=True),
        dict(scoring="sparsemixer", eps=0.2),
    ],
    ids=lambda rule: "-".join(str(value) for value in rule.values()) or "softmax",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(device: torch.device, dtype: torch.dtype, rule: dict) -> None:
    # Few enough distinct logits that every dtype chooses the same.
    logits = (torch.randperm(64, device=device) / 8).repeat(9, 1).to(dtype)
    mask = torch.arange(9, device=device) % 4 != 2
    options = {**rule, "mask": mask}
    if "probs_dtype" in rule:  # its rounding changes what is chosen, and has no gradient to compare with
        expert_ids = ops.route(logits, 2, **options)[1]
        names = ("scoring", "renormalize", "probs_dtype", "eps")
        known = {name: rule[name] for name in names if name in rule}
        direction = torch.randn(9, 2, device=device)
        (actual,) = gradients(lambda x: ops.route(x, 2, **options)[0], [logits], direction)
        truth = reference.route_grad(direction.double(), logits.double(), expert_ids, **known)
        return assert_accurate(actual, truth, truth.to(dtype), direction.abs().max().item())
    functions = [lambda x, f=f: f(x, 2, **options)[0] for f in (ops.route, reference.route, reference.route)]
    check(*functions, [logits], torch.randn(9, 2, device=device), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu_tanh", False)])
def test_activation(device: torch.device, activation: str, gated: bool, dtype: torch.dtype) -> None:
    linear = torch.randn(5, 26, device=device).to(dtype)
    act = ACTIVATION_FUNCTIONS[activation]
    check(
        lambda x: ops.activation(x, activation, gated=gated),
        lambda x: reference.activation(x, activation, gated=gated),
        lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] if gated else act(x),
        [linear],
        torch.randn(5, 13 if gated else 26, device=device),
    )


def chain(hidden: Tensor, logits: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer's ops apart and as one."""
    weights, expert_ids = ops.route(logits, 2, renormalize=True)
    plan = ops.plan(expert_ids, up.shape[0], capacity=4)
    rows = ops.permute(hidden, plan.token_of_row)
    inner = ops.grouped_gemm(rows, up, plan.expert_offsets, activation="silu", gated=True)
    gathered = ops.grouped_gemm(hidden, up, plan.expert_offsets, token_of_row=plan.token_of_row)
    inner = inner + ops.activation(gathered, "gelu", gated=True)
    out = ops.unpermute(ops.grouped_gemm(inner, down, plan.expert_offsets), plan.row_of_slot, weights)
    return out + ops.sparse_mlp(hidden, weights, plan, up, down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    x = layer_inputs(SMALL_LAYERS[0], 300, dtype)
    leaves = [x.hidden, torch.randn(300, 8), x.up_weight, x.down_weight]
    direction = torch.randn_like(x.hidden)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(gradients(chain, leaves, direction))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_gradients_that_are_not_contiguous(device: torch.device) -> None:
    x = layer_inputs(SMALL_LAYERS[0], 12, device=device)
    leaves = [x.hidden, torch.randn(12, 8, device=device), x.up_weight, x.down_weight]
    base = torch.randn(64, 24, device=device)
    for direction in (base.T[:12], base.T[::2], base[:12, :1].expand(12, 64), base[0, 0].expand(12, 64)):
        actual, expected = gradients(chain, leaves, direction), gradients(chain, leaves, direction.contiguous())
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradcheck_of_the_definitions() -> None:
    """Finite differences in float64 of what everything here is compared with."""
    shape = LayerShape("minute", 3, 2, 3, 2, bias=True)
    x = layer_inputs(shape, 4).to(torch.float64)
    x.routing_weights = x.routing_weights.double()
    plan = reference.plan(x.expert_ids, shape.num_experts, capacity=2)
    leaves = [leaf.requires_grad_() for leaf in tensors_of(x).values()]
    assert torch.autograd.gradcheck(layer_of(partial(run_layer, reference), x, plan, shape), leaves)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for rule in (dict(), dict(renormalize=True), dict(scoring="top2_gate"), dict(scoring="sparsemixer", eps=0.3)):
        assert torch.autograd.gradcheck(lambda y, rule=rule: reference.route(y, 2, **rule)[0], logits)


@pytest.mark.parametrize("op", ["route", "router_stats", "unpermute", "activation", "grouped_gemm", "sparse_mlp"])
def test_second_derivatives_are_refused(op: str) -> None:
    x = layer_inputs(SMALL_LAYERS[0], 6)
    plan = ops.plan(x.expert_ids, 8)
    slots, offsets = plan.row_of_slot, plan.expert_offsets
    run: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "route": (lambda y: ops.route(y, 2)[0], torch.randn(6, 8)),
        "router_stats": (lambda y: ops.router_stats(y, 2).prob_sums, torch.randn(6, 8)),
        "unpermute": (lambda y: ops.unpermute(torch.ones(12, 64), slots, y), x.routing_weights),
        "activation": (lambda y: ops.activation(y, "silu"), x.hidden),
        "grouped_gemm": (lambda y: ops.grouped_gemm(torch.randn(12, 64), y, offsets), x.up_weight),
        "sparse_mlp": (lambda y: ops.sparse_mlp(y, x.routing_weights, plan, x.up_weight, x.down_weight), x.hidden),
    }
    function, leaf = run[op]
    leaf = leaf.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moekernels: \w+_grad is itself a gradient and cannot be differentiated"):
        torch.autograd.grad(grad.sum(), leaf)
