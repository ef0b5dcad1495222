"""A dispatcher that exchanges rows between two processes, each of which holds half of the experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from moekernels import ops
from moekernels.nn import GroupedExperts, RouterOutput, SparseMLP, TopKRouter
from moekernels.nn.dispatcher import Experts
from tests.processes import run_processes

PROCESSES, EXPERTS, HIDDEN, FFN, TOKENS, TOP_K = 2, 6, 8, 5, 11, 3


class Exchanging:
    """Each process holds `num_local` consecutive experts."""

    def __init__(self, num_local: int) -> None:
        self.num_local = num_local

    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        plan = ops.plan(routing.expert_ids, self.num_local * PROCESSES)
        rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
        sent = plan.expert_offsets.diff().view(PROCESSES, self.num_local)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        here, there = received.sum(1).tolist(), sent.sum(1).tolist()
        arrived = exchanged(rows[: sum(there)], here, there)
        ids = torch.arange(self.num_local).repeat(PROCESSES).repeat_interleave(received.view(-1))[:, None].int()
        # Every row is a token with one choice; the weights are applied where it came from.
        served = experts(arrived, torch.ones(ids.shape), ops.plan(ids, self.num_local))
        back = exchanged(served, there, here)
        return ops.unpermute(torch.cat((back, rows[sum(there) :])), plan.row_of_slot, routing.routing_weights)


def exchanged(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(all_to_all_single_autograd(rows, received, sent, dist.group.WORLD))


def whole_layer() -> SparseMLP:
    torch.manual_seed(1)
    layer = SparseMLP(HIDDEN, FFN, EXPERTS, TOP_K, bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    """Hidden states, and which of them are routed."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(TOKENS + rank, HIDDEN, generator=generator), torch.arange(TOKENS + rank) != 4


def process(rank: int) -> dict[str, Tensor]:
    whole, num_local = whole_layer(), EXPERTS // PROCESSES
    router = TopKRouter(HIDDEN, EXPERTS, TOP_K)
    router.load_state_dict(whole.router.state_dict())
    experts = GroupedExperts(HIDDEN, FFN, num_local, bias=True)
    mine = slice(rank * num_local, (rank + 1) * num_local)
    experts.load_state_dict({name: stack[mine] for name, stack in whole.experts.state_dict().items()})
    layer = SparseMLP(router, experts, Exchanging(num_local))
    hidden, mask = tokens(rank)
    hidden.requires_grad_()
    out, _ = layer(hidden, mask)
    (out * out.detach().cos()).sum().backward()
    dist.all_reduce(router.weight.grad)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **grads}


def test_as_in_one_process() -> None:
    found = run_processes(process, PROCESSES)
    layer = whole_layer()
    for rank in range(PROCESSES):
        hidden, mask = tokens(rank)
        hidden.requires_grad_()
        out, _ = layer(hidden, mask)
        (out * out.detach().cos()).sum().backward()
        torch.testing.assert_close(found[rank]["out"], out.detach())
        torch.testing.assert_close(found[rank]["hidden"], hidden.grad)
        assert (out[4] == 0).all()
    torch.testing.assert_close(found[0]["router.weight"], layer.router.weight.grad)
    for name, parameter in layer.experts.named_parameters():
        stack = torch.cat([found[rank][f"experts.{name}"] for rank in range(PROCESSES)])
        torch.testing.assert_close(stack, parameter.grad, atol=1e-5, rtol=1e-4)
