"""What the processes of `test_layers.py` run: one layer, dispatched in every way."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from moekernels.bench.ranks import measure
from moekernels.bench.shapes import LayerShape
from moekernels.distributed import ExpertParallel, Ranks, dropped_choices, expert_parallel, reduce_gradients
from moekernels.nn import LocalDispatcher, SparseMLP
from tests.distributed.compare import gradients_off, normal_, off, part, split

HIDDEN, FFN, TOKENS = 16, 12, 13
ENOUGH, FEW = 3 * TOKENS, 4  # rows per rank: for every choice of every token, and for some

#: Experts, choices, options of the layer, capacity of its dispatcher.
LAYERS: dict[str, tuple[int, int, dict[str, Any], dict[str, int]]] = {
    "6 experts, 3 choices": (6, 3, {"bias": True}, {}),
    "5 experts, 1 choice": (5, 1, {"gated": False, "activation": "relu"}, {}),
    "8 experts, 2 choices, renormalised": (8, 2, {"renormalize": True}, {}),
    "4 experts, capacity of the batch": (4, 2, {}, {"capacity": 4}),
    "4 experts, capacity of 3 tokens": (4, 2, {}, {"capacity": 1, "group_size": 1}),
}
WAYS = ("exact", "partial", "all_reduce", "exact, fixed rows", "partial, fixed rows")
#: With sizes that are exchanged, the graph is broken there.
COMPILED = {
    "exact": {"backend": "aot_eager"},
    "partial, fixed rows": {"backend": "aot_eager", "fullgraph": True},
}


def layer(name: str, dtype: torch.dtype = torch.float32) -> SparseMLP:
    num_experts, top_k, options, capacity = LAYERS[name]
    made = SparseMLP(
        HIDDEN, FFN, num_experts, top_k, dispatcher=LocalDispatcher(num_experts, **capacity), **options
    ).to(dtype)
    normal_(made)
    # Exact in any order, so that the router's product does not depend on how many rows there are.
    weight = made.get_parameter("router.weight")
    weight.data = (weight.data * 16).round() / 16
    return made


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(TOKENS, HIDDEN, generator=generator) * 4).round().to(dtype) / 4, torch.arange(TOKENS) != 4


def backward(out: torch.Tensor) -> None:
    (out * out.detach().cos()).sum().backward()


def run(rank: int) -> dict[str, Any]:
    """The differences of every case from one process, and what else is asserted about a layer."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))["ep"]
    found: dict[str, Any] = {}
    for name, way, dtype in itertools.product(LAYERS, WAYS, (torch.float32, torch.bfloat16)):
        found[f"{name}, {way}, {str(dtype).removeprefix('torch.')}"] = compare(name, way, dtype, mesh, rank)
    found["placements"] = _placements(mesh)
    found["parallelize_module"] = _by_a_plan(mesh, rank)
    found["dropout"] = _dropout(mesh)
    for sums in ("exact", "partial"):
        found[f"few rows, {sums}"] = _few_rows(sums, mesh, rank)
    found["exchanges"] = {way: _exchanges(way, mesh) for way in ("exact", "exact, fixed rows")}
    for way in COMPILED if size == 2 else ():
        found[f"compiled, {way}"] = _compiled(way, mesh, rank)
    sent = measure(LayerShape("wide", 512, 8, 8, 2), 64, torch.bfloat16, mesh, training=True, budget=0.0)
    found["sent"] = {row.way: (row.sent_bytes, row.least_bytes) for row in sent}
    return found


def divide(made: SparseMLP, way: str, mesh: Any) -> None:
    if way == "all_reduce":
        expert_parallel(made, mesh, dispatch="all_reduce")
        return
    sums: Any
    sums, _, fixed = way.partition(", ")
    expert_parallel(made, mesh, sums=sums, rows_per_rank=ENOUGH if fixed else None)


def compare(name: str, way: str, dtype: torch.dtype, mesh: Any, rank: int) -> dict[str, float]:
    one = layer(name, dtype)
    many = copy.deepcopy(one)
    divide(many, way, mesh)
    hidden, mask = tokens(dtype)
    counts = split(TOKENS, mesh.size()) if way != "all_reduce" else [TOKENS] * mesh.size()
    mine = (lambda x: x) if way == "all_reduce" else lambda x: part(x, counts, rank)

    given = hidden.clone().requires_grad_()
    expected, logits = one(given, mask)
    backward(expected)
    taken = mine(hidden).clone().requires_grad_()
    out, own_logits = many(taken, mine(mask))
    backward(out)
    reduce_gradients(many, average=False)
    assert given.grad is not None and taken.grad is not None
    return {
        "output": off(out.detach(), mine(expected.detach())),
        "logits": off(own_logits.detach(), mine(logits.detach())),
        "gradient of the tokens": off(taken.grad, mine(given.grad)),
        "gradients": gradients_off(many, one),
    }


def _placements(mesh: Any) -> list[int]:
    """The experts of every rank: 5 on 2 are 3 and 2, on 4 they are 2, 2, 1 and 0."""
    sharded = expert_parallel(layer("5 experts, 1 choice"), mesh)
    weight = sharded.get_parameter("experts.down_proj")
    assert isinstance(weight, DTensor) and weight.placements == (Shard(0),) and weight.shape == (5, HIDDEN, FFN)
    return [int(n) for n in _gathered(torch.tensor(weight.to_local().shape[0]))]


def _gathered(number: torch.Tensor) -> list[torch.Tensor]:
    numbers = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    return numbers


def _by_a_plan(mesh: Any, rank: int) -> float:
    """Through torch's own function, in a module that holds other things too."""
    one = torch.nn.Sequential(torch.nn.ReLU(), layer("6 experts, 3 choices"))
    many = parallelize_module(copy.deepcopy(one), mesh, {"1": ExpertParallel(sums="exact")})
    hidden, _ = tokens()
    counts = split(TOKENS, mesh.size())
    out, _ = many(part(hidden, counts, rank))
    return off(out.detach(), part(one(hidden)[0].detach(), counts, rank))


def _dropout(mesh: Any) -> dict[str, Any]:
    """Where ranks compute alike, they draw the same numbers after a layer in which each dropped activations."""
    made = normal_(SparseMLP(HIDDEN, FFN, 4, 2, dropout=0.5, output_dropout=0.1)).train()
    expert_parallel(made, mesh, dispatch="all_reduce")
    hidden, _ = tokens()
    torch.manual_seed(1)
    first, _ = made(hidden)
    drawn = torch.rand(())
    second, _ = made(hidden)
    return {"drawn": [float(x) for x in _gathered(drawn)], "differs": off(first.detach(), second.detach())}


def _few_rows(sums: Any, mesh: Any, rank: int) -> dict[str, Any]:
    """Choices that no row is left for, beside a layer to whose routing the same rule was applied one by one."""
    name = "6 experts, 3 choices"
    one = layer(name)
    many: Any = expert_parallel(copy.deepcopy(one), mesh, sums=sums, rows_per_rank=FEW)
    mine = part(tokens()[0], split(TOKENS, mesh.size()), rank)
    routing = one.router(mine)
    kept, dropped = _served(routing.expert_ids, sums, mesh.size())
    expected = one.dispatcher.run(mine, routing._replace(expert_ids=kept), one.experts)
    out, _ = many(mine)
    counted = [dropped_choices(many), dropped_choices(many)]
    return {"output": off(out.detach(), expected.detach()), "counted": counted, "expected": [dropped, 0]}


def _served(expert_ids: torch.Tensor, sums: str, size: int) -> tuple[torch.Tensor, int]:
    """What is left of ``expert_ids [T, K]``, and how many choices are not."""
    ids = expert_ids.tolist()
    share = -(-6 // size)
    left = dict.fromkeys(range(size), FEW)
    kept = [[-1] * len(choices) for choices in ids]
    for k in range(3):
        for t, choices in enumerate(ids):
            rank = choices[k] // share
            ranks = [choice // share for choice in choices]
            is_summed = sums == "partial" or len(set(ranks)) == 1
            if is_summed and rank in ranks[:k]:
                continue  # it shares the row of an earlier choice
            if left[rank]:
                left[rank] -= 1
                for j in range(3):
                    if j == k or (is_summed and ranks[j] == rank):
                        kept[t][j] = choices[j]
    remaining = torch.tensor(kept, dtype=torch.int32).reshape(expert_ids.shape)
    return remaining, int((remaining != expert_ids).sum())


def _exchanges(way: str, mesh: Any) -> list[str]:
    """What is exchanged in a forward pass."""
    made = layer("6 experts, 3 choices")
    divide(made, way, mesh)
    seen = []
    exchange = Ranks.exchange
    with mock.patch.object(Ranks, "exchange", lambda *args: (seen.append(args[4]), exchange(*args))[1]):
        made(tokens()[0])
    return seen


def _compiled(way: str, mesh: Any, rank: int) -> dict[str, float]:
    """A compiled step beside the same one as it is, with two numbers of tokens."""
    eager = layer("6 experts, 3 choices")
    divide(eager, way, mesh)
    compiled_layer = layer("6 experts, 3 choices")
    divide(compiled_layer, way, mesh)
    compiled = torch.compile(compiled_layer, dynamic=True, **COMPILED[way])  # type: ignore[call-overload]
    worst = {"output": 0.0, "gradient of the tokens": 0.0, "gradients": 0.0}
    for count in (TOKENS, 6):
        steps = []
        for made in (eager, compiled):
            hidden = tokens()[0][rank : rank + count].requires_grad_()
            out, _ = made(hidden)
            backward(out)
            steps.append((out.detach(), hidden.grad))
        (out, grad), (own, own_grad) = steps
        found = (off(own, out), off(own_grad, grad), gradients_off(compiled_layer, eager))
        worst = {key: max(value, new) for (key, value), new in zip(worst.items(), found, strict=True)}
    return worst
