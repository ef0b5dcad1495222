"""Gradients on a GPU: right, the same every time, in a CUDA graph, and on the caller's stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels import ops
from moekernels.nn import SparseMLP
from moekernels.ops import reference
from tests.generators import LayerShape
from tests.gpu.graphs import captured
from tests.gpu.layer import SHAPE, TOKENS, UNGATED, Layer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = (SHAPE, UNGATED, LayerShape("gpu-odd", 37, 51, 5, 3, activation="gelu"))


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs(cuda: torch.device, dtype: torch.dtype, shape: LayerShape, num_tokens: int) -> None:
    layer = Layer.random(shape, num_tokens, dtype, cuda)
    direction = torch.randn_like(layer.x.hidden)
    for capacity in (None, num_tokens // 4 + 1):
        first = layer.gradients(direction, capacity)
        layer.assert_gradients(first, layer.true_gradients(direction, capacity))
        noise = torch.randn(2048, 2048, device=cuda)
        for _ in range(10):
            noise = noise @ noise / 50  # other work, so that blocks come and go in another order
            again = layer.gradients(direction, capacity)
            assert all(torch.equal(again[name], grad) for name, grad in first.items())


@pytest.mark.parametrize("num_experts", [8, 64, 300, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_stats(cuda: torch.device, dtype: torch.dtype, num_experts: int) -> None:
    """Sums of many blocks, and their gradient."""
    logits = torch.randn(3 * 5000, num_experts, device=cuda).to(dtype).requires_grad_()
    directions = [torch.randn(3, num_experts, device=cuda), torch.randn(3, device=cuda)]

    def run(module: object, logits: Tensor, directions: list[Tensor]) -> list[Tensor]:
        counts, *sums = module.router_stats(logits, 4, num_groups=3)  # type: ignore[attr-defined]
        return [counts, *(x.detach() for x in sums), *torch.autograd.grad(sums, logits, directions)]

    first = run(ops, logits, directions)
    truth = run(reference, logits.detach().double().requires_grad_(), [x.double() for x in directions])
    assert torch.equal(first[0], truth[0].float())
    for actual, expected in zip(first[1:], truth[1:], strict=True):
        eps = 8 * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=eps * expected.abs().max().item())
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(run(ops, logits, directions), first, strict=True))


def test_gradients_of_copies(cuda: torch.device) -> None:
    """Rows that name a token in any number and order: the sum of a token's rows runs in their order."""
    for dtype in DTYPES:
        hidden = torch.randn(500, 264, device=cuda).to(dtype).requires_grad_()
        token_of_row = torch.randint(-1, 520, (3000,), dtype=torch.int32, device=cuda)
        direction = torch.randn(3000, 264, device=cuda).to(dtype)
        (first,) = torch.autograd.grad(ops.permute(hidden, token_of_row), hidden, direction)
        wide = hidden.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(reference.permute(wide, token_of_row), wide, direction.double())
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(first.double(), truth, rtol=eps, atol=eps * 8)
        for _ in range(5):
            assert torch.equal(torch.autograd.grad(ops.permute(hidden, token_of_row), hidden, direction)[0], first)


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", [SHAPE, UNGATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_backward_pass_follows_its_inputs(
    cuda: torch.device, dtype: torch.dtype, shape: LayerShape, num_tokens: int
) -> None:
    """Replayed with other logits, hidden states and gradients it gives, bit for bit, what the eager pass gives."""
    layer = Layer.random(shape, num_tokens, dtype, cuda)
    direction = torch.randn_like(layer.x.hidden)
    capacity = num_tokens // 2 + 1
    graph, grads = captured(lambda: list(layer.gradients(direction, capacity).values()))
    for seed in range(3):
        other = Layer.random(shape, num_tokens, dtype, cuda, seed)
        layer.logits.copy_(other.logits)
        layer.x.hidden.copy_(other.x.hidden)
        direction.normal_()
        for grad in grads:
            grad.fill_(float("nan"))
        graph.replay()
        eager = layer.gradients(direction, capacity)
        assert all(torch.equal(grad, expected) for grad, expected in zip(grads, eager.values(), strict=True))
        layer.assert_gradients(eager, layer.true_gradients(direction, capacity))


def training(device: torch.device) -> tuple[SparseMLP, Callable[[], list[Tensor]]]:
    """A layer and one step of its training under autocast, with both auxiliary losses."""
    torch.manual_seed(0)
    mlp = SparseMLP(64, 48, 8, 2, renormalize=True, device=device)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    hidden, target = torch.randn(300, 64, device=device), torch.randn(300, 64, device=device) * 0.3
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=1e-2, capturable=device.type == "cuda")

    def step() -> list[Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out, logits = mlp(hidden)
        stats = ops.router_stats(logits, 2)
        balance = (stats.counts * stats.prob_sums).sum() * 8 / len(hidden) ** 2
        loss = F.mse_loss(out.float(), target) + 1e-3 * balance + 1e-4 * stats.z_sums.sum() / len(hidden)
        parameters = list(mlp.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        optimiser.step()
        return [loss.detach()]

    return mlp, step


def test_a_captured_training_step_learns(cuda: torch.device) -> None:
    """Forward and backward pass, optimiser and all, as one graph: the losses of the eager loop."""
    _, step = training(cuda)
    expected = [step()[0].item() for _ in range(40)]
    mlp, step = training(cuda)
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    graph, (loss,) = captured(step)  # its warm-up has taken the first step, the capture none
    losses = []
    for _ in range(39):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * expected[0]
    torch.testing.assert_close(losses, expected[1:], rtol=0.05, atol=2e-3)
    assert all(not torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device(cuda: torch.device) -> None:
    """Forwards and backwards; the optimiser is not ours to judge."""
    layer = Layer.random(UNGATED, 40, torch.bfloat16, cuda)
    direction = torch.randn_like(layer.x.hidden)
    rows, offsets = layer.x.hidden, torch.tensor([0, 1, 3, 9, 9, 20, 30, 31, 40], dtype=torch.int32, device=cuda)
    tokens = torch.randint(-1, 40, (40,), dtype=torch.int32, device=cuda)

    def run() -> None:
        layer.gradients(direction)
        leaves = [x.detach().requires_grad_() for x in (rows, layer.x.up_weight, layer.logits)]
        out = ops.grouped_gemm(leaves[0], leaves[1], offsets, activation="silu", gated=True, token_of_row=tokens)
        sums = ops.router_stats(leaves[2], 2)[1:]
        torch.autograd.grad([out, *sums], leaves, [torch.ones_like(x) for x in (out, *sums)])

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_a_side_stream_sees_its_own_order(cuda: torch.device, num_tokens: int) -> None:
    """The inputs are made on a side stream after a long wait: a launch on another stream would read them too early."""
    truth = Layer.random(SHAPE, num_tokens, torch.bfloat16, cuda)
    direction = torch.randn_like(truth.x.hidden)
    expected = truth.gradients(direction)
    layer = Layer.random(SHAPE, num_tokens, torch.bfloat16, cuda)
    layer.logits.zero_()
    layer.x.hidden.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        layer.logits.copy_(truth.logits)
        layer.x.hidden.copy_(truth.x.hidden)
        results = {name: grad.clone() for name, grad in layer.gradients(direction).items()}
    side.synchronize()
    assert all(torch.equal(results[name], grad) for name, grad in expected.items())


def int32(device: torch.device, *values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("width", [48, 49])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_that_do_not_fit_stay_inside(cuda: torch.device, dtype: torch.dtype, width: int) -> None:
    """On the device they cannot be checked without waiting for it."""
    grads, linear = torch.randn(40, width, device=cuda).to(dtype), torch.randn(40, 2 * width, device=cuda).to(dtype)
    for last in (-5, 2**31 - 1, -(2**31)):
        offsets = int32(cuda, 0, 7, last)
        results = torch.ops.moekernels.activation_grad(grads, linear, "silu", True, None, offsets)
        expected = torch.ops.moekernels.activation_grad(grads, linear, "silu", True)
        for actual, full in zip(results, expected, strict=True):
            assert torch.equal(actual, full if last > 0 else torch.zeros_like(full))


@pytest.mark.parametrize("width", [48, 49])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_that_do_not_fit_stay_inside(cuda: torch.device, dtype: torch.dtype, width: int) -> None:
    """What does fit has its gradient."""
    kernels = torch.ops.moekernels
    grads, rows = torch.randn(3, width, device=cuda).to(dtype), torch.randn(6, width, device=cuda).to(dtype)
    slots, tokens = int32(cuda, [0, -5], [6, 2**31 - 1], [2, 4]), int32(cuda, 0, 1, 1, 99, 2, -(2**31))
    grad_rows, grad_weights = kernels.unpermute_grad(grads, rows, slots, tokens)
    owners = torch.tensor([0, -1, -1, -1, 2, -1], device=cuda)
    assert torch.equal(grad_rows, torch.where(owners[:, None] >= 0, grads[owners.clamp(min=0)], 0))
    assert (grad_weights == 0).tolist() == [[False, True], [True, True], [False, False]]

    logits, ids = torch.randn(3, 8, device=cuda).to(dtype), int32(cuda, [0, 99], [-7, 2**31 - 1], [3, -(2**31)])
    fitting = torch.where((ids >= 0) & (ids < 8), ids, -1)
    for scoring in ("softmax", "top2_gate", "sparsemixer"):
        grad = kernels.route_grad(torch.ones(3, 2, device=cuda), logits, ids, scoring)
        assert torch.equal(grad, kernels.route_grad(torch.ones(3, 2, device=cuda), logits, fitting, scoring))
        assert grad.isfinite().all() and not grad[1].any()
    torch.cuda.synchronize()
