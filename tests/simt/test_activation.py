"""``csrc/cuda/rows/activation.cu`` on the CPU, against autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops import Swiglu
from tests.simt.device import Settings, Simt, SimtLibrary, poisoned
from tests.simt.gemm_problems import activation_fields
from tests.simt.params import Activation
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "none": (Activation.NONE, lambda x: x),
    "relu": (Activation.RELU, F.relu),
    "gelu": (Activation.GELU, F.gelu),
    "gelu_tanh": (Activation.GELU_TANH, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (Activation.SILU, F.silu),
    "relu2": (Activation.RELU2, lambda x: F.relu(x).square()),
}
SWIGLU = Swiglu(alpha=1.702, limit=4.0, shift=1.0)
# Below, at and above a vector and a warp's piece of a row; the last ones take a block per row.
WIDTHS = (1, 7, 8, 36, 264, 1032, 2056)
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library("rows/activation.cu")


def forward(linear: Tensor, activation: str | Swiglu, gated: bool) -> Tensor:
    if isinstance(activation, Swiglu):
        return activation(linear)
    act = ACTIVATIONS[activation][1]
    if not gated:
        return act(linear)
    gate, value = linear.chunk(2, dim=-1)
    return act(gate) * value


def run_activation(
    library: SimtLibrary,
    linear: Tensor,
    activation: str | Swiglu,
    gated: bool,
    out: Tensor | None = None,
    seed: int = 1,
) -> Tensor:
    width = linear.shape[1] // (2 if gated else 1)
    out = poisoned((linear.shape[0], width), linear.dtype) if out is None else out
    library.run(
        "activation",
        settings=Settings(seed=seed),
        linear=linear,
        out=out,
        num_rows=linear.shape[0],
        width=width,
        **activation_fields(activation),
        gated=gated,
        dtype=linear.dtype,
    )
    return out


@dataclass
class Grads:
    linear: Tensor
    scaled: Tensor | None
    scale: Tensor | None


def run_grad(
    library: SimtLibrary,
    grad_out: Tensor,
    linear: Tensor,
    activation: str | Swiglu,
    gated: bool,
    row_scale: Tensor | None = None,
    expert_offsets: Tensor | None = None,
    *,
    in_place: bool = False,
    with_scaled: bool = True,
    with_scale: bool = True,
    seed: int = 1,
) -> Grads:
    num_rows, width = grad_out.shape
    grads = Grads(
        linear if in_place else poisoned(tuple(linear.shape), linear.dtype),
        grad_out if in_place else poisoned((num_rows, width), linear.dtype) if with_scaled else None,
        poisoned((num_rows,), torch.float32) if with_scale else None,
    )
    library.run(
        "activation_grad",
        settings=Settings(seed=seed),
        grad_out=grad_out,
        linear=linear,
        row_scale=row_scale,
        expert_offsets=expert_offsets,
        grad_linear=grads.linear,
        scaled=grads.scaled,
        grad_scale=grads.scale,
        num_rows=num_rows,
        width=width,
        num_experts=0 if expert_offsets is None else expert_offsets.shape[0] - 1,
        **activation_fields(activation),
        gated=gated,
        dtype=linear.dtype,
    )
    return grads


def expected_grads(
    grad_out: Tensor, linear: Tensor, activation: str | Swiglu, gated: bool, row_scale: Tensor | None, used: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of `linear`, by autograd; the row scale multiplies in that dtype."""
    scale = torch.ones(linear.shape[0], 1) if row_scale is None else row_scale[:, None]
    scale = scale.to(linear.dtype)
    leaf = linear.detach()[:used].requires_grad_()
    out = forward(leaf, activation, gated)
    (grad_linear,) = torch.autograd.grad(out, leaf, grad_out[:used] * scale[:used])
    results = [torch.zeros_like(linear), torch.zeros_like(grad_out), torch.zeros_like(grad_out[:, 0])]
    results[0][:used] = grad_linear
    results[1][:used] = out.detach() * scale[:used]
    results[2][:used] = (grad_out[:used] * out.detach()).sum(-1)
    return results[0], results[1], results[2]


def assert_grads(
    actual: Grads,
    grad_out: Tensor,
    linear: Tensor,
    activation: str | Swiglu,
    gated: bool,
    row_scale: Tensor | None = None,
    used: int | None = None,
) -> None:
    used = linear.shape[0] if used is None else used
    truth = expected_grads(grad_out.double(), linear.double(), activation, gated, row_scale, used)
    plain = expected_grads(grad_out, linear, activation, gated, row_scale, used)
    assert_accurate(actual.linear, truth[0], plain[0])
    if actual.scaled is not None:
        assert_accurate(actual.scaled, truth[1], plain[1])
    if actual.scale is not None:
        # Sums of rounded inputs, kept in float32 whatever the dtype.
        plain = expected_grads(grad_out.float(), linear.float(), activation, gated, row_scale, used)
        assert_accurate(actual.scale, truth[2], plain[2], scale=grad_out.double().abs().sum(-1).max().item())
    assert not actual.linear[used:].any()


def problem(num_rows: int, width: int, gated: bool, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """grad_out, linear, row_scale."""
    torch.manual_seed(seed)
    linear = torch.randn(num_rows, width * (2 if gated else 1)) * 3
    return torch.randn(num_rows, width).to(dtype), linear.to(dtype), torch.rand(num_rows) * 2 - 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@GATED
def test_every_activation(library: SimtLibrary, gated: bool, activation: str) -> None:
    for dtype in DTYPES:
        grad_out, linear, row_scale = problem(5, 40, gated, dtype)
        linear[0, 0], linear[1, 1] = 0.0, -0.0
        out = run_activation(library, linear, activation, gated)
        truth = forward(linear.double(), activation, gated)
        assert_accurate(out, truth, forward(linear, activation, gated))
        grads = run_grad(library, grad_out, linear, activation, gated, row_scale)
        assert_grads(grads, grad_out, linear, activation, gated, row_scale)


@pytest.mark.parametrize("width", WIDTHS)
@GATED
def test_every_width(library: SimtLibrary, gated: bool, width: int) -> None:
    for seed, dtype in enumerate(DTYPES):
        grad_out, linear, row_scale = problem(3, width, gated, dtype, seed)
        out = run_activation(library, linear, "silu", gated, seed=seed)
        assert_accurate(out, forward(linear.double(), "silu", gated), forward(linear, "silu", gated))
        offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
        grads = run_grad(library, grad_out, linear, "silu", gated, row_scale, offsets, seed=seed)
        assert_grads(grads, grad_out, linear, "silu", gated, row_scale, used=2)
        assert len(library.launches) == 1


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("width", (1, 7, 8, 264, 2056))
def test_swiglu(library: SimtLibrary, width: int, interleaved: bool) -> None:
    gate = replace(SWIGLU, interleaved=interleaved)
    for seed, dtype in enumerate(DTYPES):
        grad_out, linear, row_scale = problem(3, width, True, dtype, seed)
        out = run_activation(library, linear, gate, True, seed=seed)
        assert_accurate(out, forward(linear.double(), gate, True), forward(linear, gate, True))
        offsets = torch.tensor([0, 2, 2], dtype=torch.int32)
        grads = run_grad(library, grad_out, linear, gate, True, row_scale, offsets, seed=seed)
        assert_grads(grads, grad_out, linear, gate, True, row_scale, used=2)
        again = run_grad(library, grad_out.clone(), linear.clone(), gate, True, row_scale, offsets, in_place=True)
        assert torch.equal(again.linear, grads.linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@GATED
def test_any_alignment(library: SimtLibrary, gated: bool, dtype: torch.dtype) -> None:
    """Each of the matrices alone off a vector's boundary."""
    grad_out, linear, row_scale = problem(3, 24, gated, dtype)

    def shifted(x: Tensor) -> Tensor:
        space = torch.empty(x.numel() + 1, dtype=dtype)
        return space[1:].view(x.shape).copy_(x)

    expected = run_grad(library, grad_out, linear, "gelu", gated, row_scale)
    out = run_activation(library, linear, "gelu", gated)
    for inputs in ((shifted(grad_out), linear), (grad_out, shifted(linear))):
        actual = run_grad(library, *inputs, "gelu", gated, row_scale)
        assert torch.equal(actual.linear, expected.linear) and torch.equal(actual.scaled, expected.scaled)
        torch.testing.assert_close(actual.scale, expected.scale)
    assert torch.equal(run_activation(library, shifted(linear), "gelu", gated), out)
    assert torch.equal(run_activation(library, linear, "gelu", gated, out=shifted(out)), out)
    for shift_grad in (False, True):  # in place, so that only the outputs' places differ
        inputs = (shifted(grad_out), linear.clone()) if shift_grad else (grad_out.clone(), shifted(linear))
        actual = run_grad(library, *inputs, "gelu", gated, row_scale, in_place=True)
        assert torch.equal(actual.linear, expected.linear) and torch.equal(actual.scaled, expected.scaled)


@pytest.mark.parametrize("width", [24, 37, 2056])
@GATED
def test_in_place(library: SimtLibrary, gated: bool, width: int) -> None:
    grad_out, linear, row_scale = problem(4, width, gated, torch.bfloat16)
    offsets = torch.tensor([0, 0, 3], dtype=torch.int32)
    expected = run_grad(library, grad_out, linear, "silu", gated, row_scale, offsets)
    for seed in range(3):
        actual = run_grad(
            library, grad_out.clone(), linear.clone(), "silu", gated, row_scale, offsets, in_place=True, seed=seed
        )
        for name in ("linear", "scaled", "scale"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("width", [16, 2056])
def test_unused_rows_have_no_influence_and_become_zero(library: SimtLibrary, width: int) -> None:
    grad_out, linear, row_scale = problem(6, width, True, torch.float16)
    expected = run_grad(library, grad_out[:4], linear[:4], "silu", True, row_scale[:4])
    grad_out[4:], linear[4:], row_scale[4:] = float("nan"), float("inf"), float("nan")
    for offsets, used in (([0, 1, 4], 4), ([0, 0, 0], 0)):
        actual = run_grad(library, grad_out, linear, "silu", True, row_scale, torch.tensor(offsets, dtype=torch.int32))
        for name in ("linear", "scaled", "scale"):
            assert torch.equal(getattr(actual, name)[:used], getattr(expected, name)[:used])
            assert not getattr(actual, name)[used:].any(), name
    # Offsets that do not fit stay inside the tensors.
    run_grad(library, grad_out, linear, "silu", True, row_scale, torch.tensor([0, 2**31 - 1], dtype=torch.int32))


@GATED
def test_results_that_nobody_wants(library: SimtLibrary, gated: bool) -> None:
    grad_out, linear, _ = problem(3, 48, gated, torch.float32)
    for with_scaled, with_scale in ((False, True), (True, False), (False, False)):
        grads = run_grad(library, grad_out, linear, "relu", gated, with_scaled=with_scaled, with_scale=with_scale)
        assert_grads(grads, grad_out, linear, "relu", gated)


def test_a_row_has_the_same_sum_in_every_batch(library: SimtLibrary) -> None:
    for width in (136, 2056):
        grad_out, linear, row_scale = problem(5, width, True, torch.bfloat16)
        together = run_grad(library, grad_out, linear, "silu", True, row_scale).scale
        assert together is not None
        for seed, row in enumerate((0, 3)):
            one = slice(row, row + 1)
            alone = run_grad(library, grad_out[one], linear[one], "silu", True, row_scale[one], seed=seed)
            assert torch.equal(alone.scale, together[one])


def test_large_values_and_nan(library: SimtLibrary) -> None:
    linear = torch.tensor([[-100.0, -30.0, 30.0, 100.0, 0.0, float("nan"), -1.0, 1.0]])
    ones = torch.ones(1, 8)
    for activation in ACTIVATIONS:
        grads = run_grad(library, ones, linear, activation, False).linear
        leaf = linear.double().requires_grad_()
        (truth,) = torch.autograd.grad(forward(leaf, activation, False).sum(), leaf)
        torch.testing.assert_close(grads.double(), truth, rtol=2e-6, atol=2e-6, equal_nan=True)


@GATED
def test_nothing_to_do(library: SimtLibrary, gated: bool) -> None:
    factor = 2 if gated else 1
    run_activation(library, torch.zeros(0, 8 * factor), "relu", gated)
    assert library.launches == []
    run_activation(library, torch.zeros(3, 0), "relu", gated)
    assert library.launches == []
    run_grad(library, torch.zeros(0, 8), torch.zeros(0, 8 * factor), "relu", gated)
    assert library.launches == []
    grads = run_grad(library, torch.zeros(3, 0), torch.zeros(3, 0), "relu", gated)
    assert grads.scale is not None and not grads.scale.any(), "empty sums are zero"
