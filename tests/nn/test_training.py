"""Training a layer: autocast, compilation, and several processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.nn import GroupedExperts, SparseMLP, TopKRouter
from tests.processes import run_processes


def make(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **options: object) -> SparseMLP:
    mlp = SparseMLP(16, 12, 6, 2, dtype=dtype, device=device, **options)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return mlp


def gradients_of(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """The same as a layer of that dtype, forwards and backwards, with gradients in the dtype of the parameters."""
    mlp = make(bias=True, device=device)
    half = make(dtype, bias=True, device=device)
    half.load_state_dict(mlp.state_dict())
    hidden, direction = torch.randn(2, 5, 3, 16, device=device)
    with torch.autocast(device.type, dtype=dtype):
        out, logits = mlp(hidden)
    expected, expected_logits = half(hidden)
    assert out.dtype == logits.dtype == dtype
    assert torch.equal(out, expected) and torch.equal(logits, expected_logits)
    actual = gradients_of(mlp, (out.float() * direction).sum() + logits.float().logsumexp(-1).sum())
    of_half = gradients_of(half, (expected.float() * direction).sum() + expected_logits.float().logsumexp(-1).sum())
    for name, grad in actual.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, of_half[name].float()), name


def test_autocast_of_the_parts() -> None:
    router, experts = TopKRouter(16, 6, 2), GroupedExperts(16, 12, 6)
    hidden = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, ids = router(hidden)
        plan = ops.plan(ids, 6)
        out = experts(hidden, weights, plan)
        with torch.autocast("cpu", enabled=False):
            apart = experts(hidden, weights, plan)
    assert logits.dtype == out.dtype == torch.bfloat16 and apart.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, F.linear(hidden.bfloat16(), router.weight.bfloat16()))
    half = GroupedExperts(16, 12, 6, dtype=torch.bfloat16)
    half.load_state_dict(experts.state_dict())
    assert torch.equal(out, half(hidden.bfloat16(), weights, plan))


def test_no_autocast_on_the_meta_device() -> None:
    """Shapes can be asked for without memory, under another device's autocast too."""
    mlp = SparseMLP(16, 12, 6, 2, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, logits = mlp(torch.empty(3, 4, 16, device="meta", dtype=torch.float16))
    assert out.shape == (3, 4, 16) and logits.shape == (12, 6) and out.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "gated": False, "renormalize": True}], ids=["gated", "biased"])
def test_a_step_on_the_meta_device(options: dict, dtype: torch.dtype) -> None:
    """Gradients have the shapes and dtypes of what they belong to."""
    mlp = make(dtype, "meta", **options)
    hidden = torch.empty(3, 4, 16, device="meta", dtype=dtype, requires_grad=True)
    out, logits = mlp(hidden)
    stats = ops.router_stats(logits, 2, num_groups=3)
    routing = mlp.router(hidden)
    apart = mlp.experts(hidden.view(12, 16), routing.routing_weights, ops.plan(routing.expert_ids, 6), dropout=0.5)
    (out.sum() + apart.sum() + stats.prob_sums.sum() + stats.z_sums.sum()).backward()
    for tensor in (hidden, *mlp.parameters()):
        assert tensor.grad is not None and tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("options", [{}, {"bias": True, "gated": False, "renormalize": True}], ids=["gated", "biased"])
def test_compiles_forwards_and_backwards(device: torch.device, options: dict) -> None:
    """One graph for every number of tokens."""
    mlp = make(device=device, **options)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = mlp(hidden)
        return out, ops.router_stats(logits, 2).prob_sums

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(function: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor) -> list[Tensor]:
        hidden = hidden.clone().requires_grad_()
        out, sums = function(hidden)
        loss = (out * out.detach().cos()).sum() + sums.square().sum()
        return [out, sums, *torch.autograd.grad(loss, [hidden, *mlp.parameters()])]

    run(compiled, torch.randn(6, 16, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (9, 2, 31, 6):
            hidden = torch.randn(num_tokens, 16, device=device)
            for actual, expected in zip(run(compiled, hidden), run(forward, hidden), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiles_under_autocast() -> None:
    mlp, hidden = make(), torch.randn(7, 16)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = compiled(hidden)
        expected, _ = mlp(hidden)
    assert torch.equal(out, expected)
    compiled_grads, grads = gradients_of(mlp, out.float().sum()), gradients_of(mlp, expected.float().sum())
    assert all(torch.equal(compiled_grads[name], grad) for name, grad in grads.items())


def test_a_layer_learns(device: torch.device) -> None:
    """Loss falls under a stock optimiser: gradients point the right way, through the router too."""
    mlp = make(renormalize=True, device=device)
    hidden, target = torch.randn(64, 16, device=device), torch.randn(64, 16, device=device) * 0.3
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(mlp(hidden)[0], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --- several processes ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A sparse layer between two dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(8, 16), make(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.mlp(hidden)[0])


def model_and_batch() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randn(2, 10, 8)


def train_in_parallel(rank: int) -> dict[str, dict[str, Tensor]]:
    """One process of two: its half of the batch, and the gradients of all of it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    replicated, batch = model_and_batch()
    sharded, _ = model_and_batch()
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded.mlp, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for parallel in (DistributedDataParallel(replicated), sharded):
        parallel(batch[rank]).square().sum().backward()
    return {
        "ddp": {name: p.grad for name, p in replicated.named_parameters()},
        "fsdp": {name: p.grad.full_tensor() for name, p in sharded.named_parameters()},
    }


@pytest.fixture(scope="module")
def parallel_gradients() -> dict[str, dict[str, Tensor]]:
    return run_processes(train_in_parallel, 2)[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes(parallel_gradients: dict[str, dict[str, Tensor]], how: str) -> None:
    """The mean of both halves' gradients, as one process finds it."""
    model, batch = model_and_batch()
    (sum(model(half).square().sum() for half in batch) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parallel_gradients[how][name], parameter.grad)
