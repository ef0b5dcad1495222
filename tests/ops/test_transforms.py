"""Every op under torch.func, in forward mode, differentiated twice, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference

# Forward mode makes torch use its own deprecated compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

T, E, K, H, F = 5, 4, 2, 6, 3


class Case(NamedTuple):
    """An op as a function of some tensors; `definition` is the same of the definitions, on which torch is right."""

    op: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    plan = ops.plan(torch.rand(T, E, generator=generator).topk(K).indices.int(), E)
    up, down = randn(E, 2 * F, H), randn(E, H, F)
    parts, biases = randn(2 * E, F, H), randn(2 * E, F)
    found = {}

    def case(name: str, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        found[name] = Case(
            lambda *xs: function(ops, *xs), lambda *xs: function(reference, *xs), tuple(x.clone() for x in tensors)
        )

    case("route", lambda m, x: m.route(x, K, renormalize=True)[0], randn(T, E))
    case("route top2_gate", lambda m, x: m.route(x, K, scoring="top2_gate")[0], randn(T, E))
    case("router_stats", lambda m, x: torch.cat([s.flatten() for s in m.router_stats(x, K)[1:]]), randn(T, E))
    case("permute", lambda m, x: m.permute(x, plan.token_of_row), randn(T, H))
    case("permute by slots", lambda m, x: m.permute(x, plan.token_of_row, plan.row_of_slot), randn(T, H))
    case("unpermute", lambda m, x: m.unpermute(x, plan.row_of_slot), randn(T * K, H))
    case("unpermute weighted", lambda m, x, w: m.unpermute(x, plan.row_of_slot, w), randn(T * K, H), randn(T, K))
    case("activation", lambda m, x: m.activation(x, "gelu", gated=True), randn(T, 2 * F))
    case(
        "grouped_gemm",
        lambda m, x, w, b: m.grouped_gemm(x, w, plan.expert_offsets, bias=b, activation="silu", gated=True),
        randn(T * K, H), up, randn(E, 2 * F),
    )  # fmt: skip
    case(
        "grouped_gemm of a table",
        lambda m, x, w, b: m.grouped_gemm(x, [*w], plan.expert_offsets, bias=[*b], token_of_row=plan.token_of_row),
        randn(T, H), parts, biases,
    )  # fmt: skip
    case(
        "grouped_gemm scaled",
        lambda m, x, w, s: m.grouped_gemm(x, w, plan.expert_offsets, row_scale=s, activation="gelu_tanh"),
        randn(T * K, H), up, randn(T * K),
    )  # fmt: skip
    case(
        "sparse_mlp",
        lambda m, x, r, u, d, b: m.sparse_mlp(x, r, plan, u, d, down_bias=b),
        randn(T, H), randn(T, K), up, down, randn(E, H),
    )  # fmt: skip
    case(
        "sparse_mlp of a table",
        lambda m, x, r, u, d, b: m.sparse_mlp(x, r, plan, list(u), list(d), up_bias=list(b)),
        randn(T, H), randn(T, K), parts, down, biases,
    )  # fmt: skip
    case("linear", lambda m, x, w: m.linear(x, w, activation="silu"), randn(T, H), randn(F, H))
    case("rms_norm", lambda m, x, w: m.rms_norm(x, w), randn(T, H), randn(H))
    case("attention", lambda m, q, k, v: m.attention(q, k, v, scale=0.5), *(randn(2, 2, 3, 4) for _ in range(3)))
    return found


CASES = cases()
OWN_KERNELS = [name for name in CASES if name not in ("linear", "rms_norm", "attention")]


def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar in which every output counts differently."""

    def scalar(*tensors: Tensor) -> Tensor:
        out = function(*tensors)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    return scalar


def all_of(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.tensors)))


def assert_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_grad_and_vjp(name: str) -> None:
    case = CASES[name]
    expected = torch.func.grad(total(case.definition), all_of(case))(*case.tensors)
    assert_close(torch.func.grad(total(case.op), all_of(case))(*case.tensors), expected)
    out, vjp = torch.func.vjp(case.op, *case.tensors)
    assert_close(vjp(torch.linspace(-1, 1, out.numel()).view(out.shape)), expected)


@pytest.mark.parametrize("name", CASES)
def test_grad_of_one_argument(name: str) -> None:
    case = CASES[name]
    for i in all_of(case):
        expected = torch.func.grad(total(case.definition), i)(*case.tensors)
        assert_close(torch.func.grad(total(case.op), i)(*case.tensors), expected)


@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str) -> None:
    case = CASES[name]
    batches = [torch.stack([x, 2 * x, -x], dim=1) for x in case.tensors]
    each = [case.op(*(batch[:, i] for batch in batches)) for i in range(3)]
    assert_close(torch.func.vmap(case.op, in_dims=1)(*batches), torch.stack(each))
    first_alone = torch.func.vmap(case.op, in_dims=(1, *[None] * (len(batches) - 1)))(batches[0], *case.tensors[1:])
    assert_close(first_alone[0], case.op(*case.tensors))


@pytest.mark.parametrize("name", CASES)
def test_gradients_per_sample(name: str) -> None:
    case = CASES[name]
    batches = [torch.stack([x, 2 * x]) for x in case.tensors]
    grad = torch.func.grad(total(case.op), all_of(case))
    expected = [grad(*(batch[i] for batch in batches)) for i in range(2)]
    actual = torch.func.vmap(grad)(*batches)
    for j, grads in enumerate(actual):
        assert_close(grads, torch.stack([of_sample[j] for of_sample in expected]))


@pytest.mark.parametrize("name", CASES)
def test_jacrev(name: str) -> None:
    case = CASES[name]
    assert_close(torch.func.jacrev(case.op)(*case.tensors), torch.func.jacrev(case.definition)(*case.tensors))


NO_FORWARD_MODE = "moekernels: {op} has no forward-mode derivative"


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_refused_or_right(name: str) -> None:
    case = CASES[name]
    tangents = tuple(torch.ones_like(x) for x in case.tensors)

    def dual() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(case.tensors, tangents, strict=True)]
            tangent = torch.autograd.forward_ad.unpack_dual(case.op(*duals)).tangent
            assert tangent is not None
            return tangent

    for forward in (lambda: torch.func.jvp(case.op, case.tensors, tangents)[1], dual):
        if name in OWN_KERNELS:
            with pytest.raises(RuntimeError, match=NO_FORWARD_MODE.format(op=name.split()[0])):
                forward()
        else:
            assert_close(forward(), torch.func.jvp(case.definition, case.tensors, tangents)[1])


def test_a_tangent_of_the_cotangent_is_refused() -> None:
    case = CASES["sparse_mlp"]
    out, vjp = torch.func.vjp(case.op, *case.tensors)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(vjp, (torch.ones_like(out),), (torch.ones_like(out),))


@pytest.mark.parametrize("name", [name for name in OWN_KERNELS if "permute" not in name])
def test_double_backward_is_refused(name: str) -> None:
    case = CASES[name]
    leaves = [x.clone().requires_grad_() for x in case.tensors]
    grads = torch.autograd.grad(total(case.op)(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moekernels: .* is itself a gradient and cannot be differentiated again"):
        sum(grad.square().sum() for grad in grads).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    case = CASES[name]
    wide = [x.double().requires_grad_() for x in case.tensors]
    out = case.op(*wide)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, case.definition(*wide), rtol=0, atol=0)
    torch.testing.assert_close(out.float(), case.op(*case.tensors), rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(case.op, wide)
    assert torch.autograd.gradgradcheck(case.op, wide)
    tangents = tuple(torch.ones_like(x) for x in wide)
    narrow = tuple(t.float() for t in tangents)
    tangent = torch.func.jvp(case.op, tuple(x.detach() for x in wide), tangents)[1]
    expected = torch.func.jvp(case.definition, case.tensors, narrow)[1]
    torch.testing.assert_close(tangent.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OWN_KERNELS)
def test_other_dtypes_are_refused(name: str) -> None:
    case = CASES[name]
    op = name.split()[0]
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(ValueError, match=f"moekernels::{op}: .* must be float32, bfloat16 or float16, got "):
            case.op(*(x.to(dtype) for x in case.tensors))


def test_float64_is_not_mixed() -> None:
    x, w, r = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 4, 3), torch.zeros(2, 1)
    plan = ops.plan(torch.zeros(2, 1, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="moekernels::grouped_gemm: weight must be float64 like rows, got float32"):
        ops.grouped_gemm(x, w, plan.expert_offsets)
    with pytest.raises(ValueError, match="moekernels::sparse_mlp: up_weight must be float64 like hidden, got float32"):
        ops.sparse_mlp(x, r, plan, w, torch.zeros(1, 3, 2, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="moekernels::grouped_gemm: rows must have the in_features of weight, 5, got 3"
    ):
        ops.grouped_gemm(x, torch.zeros(1, 4, 5, dtype=torch.float64), plan.expert_offsets)
    out = ops.sparse_mlp(x, r, plan, *(torch.ones(1, *s, dtype=torch.float64) for s in ((4, 3), (3, 2))))
    assert out.dtype == torch.float64  # the routing weights are float32 beside any dtype
