"""A layer whose experts are on several processes, beside the same layer on each of them alone."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekernels.bench.shapes import LayerShape
from moekernels.distributed import Ranks, expert_parallel
from moekernels.nn import SparseMLP

ALONE = "one process, all tokens"
#: Ways to divide a layer, and the options of `expert_parallel` that make them.
WAYS: dict[str, dict[str, Any]] = {
    "all_to_all, exact": {},
    "all_to_all, partial": {"sums": "partial"},
    "all_reduce": {"dispatch": "all_reduce"},
}


@dataclass(frozen=True)
class RankRow:
    """One way to run a layer on the tokens of all ranks together.

    Attributes:
        tokens: of all ranks.
        seconds: the median of a pass, on the slowest rank.
        sent_bytes: what this rank sent to others in it; None where the layer is not divided.
        least_bytes: what an exchange of tokens has to send at least: the forward pass's rows there and its own back,
            and in training their gradients; None for other ways.
    """

    way: str
    tokens: int
    training: bool
    seconds: float
    sent_bytes: int | None
    least_bytes: int | None


class _Counted(Ranks):
    """Ranks that count what they send to others."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.mesh)
        self.sent = 0

    def _all_to_all(
        self, tensors: Sequence[Tensor], sent: list[int] | None, received: list[int] | None, what: str
    ) -> tuple[Tensor, ...]:
        num_rows = tensors[0].shape[0]
        counts = sent or [num_rows // self.size] * self.size
        row_bytes = sum(tensor.nbytes for tensor in tensors) // max(num_rows, 1)
        self.sent += row_bytes * (sum(counts) - counts[self.rank])
        return super()._all_to_all(tensors, sent, received, what)

    def _all_reduce(self, tensor: Tensor, what: str) -> Tensor:
        self.sent += 2 * tensor.nbytes * (self.size - 1) // self.size  # a ring
        return super()._all_reduce(tensor, what)


def measure(
    shape: LayerShape,
    tokens: int,
    dtype: torch.dtype,
    mesh: Any,
    *,
    training: bool = False,
    budget: float = 1.0,
    ways: Collection[str] = tuple(WAYS),
    threads: int | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> list[RankRow]:
    """Every way on the same tokens, in turns. All ranks call it.

    Args:
        shape: the layer; its router is softmax and top-k.
        tokens: of all ranks together.
        dtype: of weights and tokens.
        mesh: of one dimension.
        training: forward and backward.
        budget: seconds for each way.
        ways: some of :data:`WAYS`, beside one process with all tokens.
        threads: of that one process, which is then rank 0 while the others wait; None: every rank alone, as it is.
        others: further layers by name, already divided, called with ``hidden [1, T, H]``: with the rows of this rank,
            or with all if the name ends in "all_reduce".
    """
    whole = _layer(shape, dtype, mesh.device_type)
    made = {ALONE: whole}
    counted = {}
    for way in ways:
        made[way] = divided = copy.deepcopy(whole)
        expert_parallel(divided, mesh, **WAYS[way])
        dispatcher: Any = divided.dispatcher
        counted[way] = dispatcher.ranks = _Counted(dispatcher.ranks)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator).to(mesh.device_type, dtype)
    own = hidden.tensor_split(mesh.size())[mesh.get_local_rank()]

    runs: dict[str, Callable[[], None]] = {}
    further = others or {}
    for way in (*made, *further):
        layer: nn.Module = made[way] if way in made else further[way]
        given = hidden if way == ALONE or way.endswith("all_reduce") else own
        given = given[None] if way in further else given
        runs[way] = _training(layer, given) if training else _inference(layer, given)
    if threads is not None:
        runs[ALONE] = _with_threads(threads, runs[ALONE]) if dist.get_rank(mesh.get_group()) == 0 else _nothing
    times = _in_turns(runs, mesh, budget)
    least = _least_bytes(whole, hidden, mesh) * (2 if training else 1)
    rows = []
    for way, run in runs.items():
        sent = None
        if way in counted:
            counted[way].sent = 0
            run()
            sent = counted[way].sent
        rows.append(RankRow(way, tokens, training, times[way], sent, least if way.startswith("all_to_all") else None))
    return rows


@torch.no_grad()
def _least_bytes(layer: SparseMLP, hidden: Tensor, mesh: Any) -> int:
    """A row for every token and other rank that it visits, and one back for every such token of the others."""
    router: Any = layer.router
    owner = router(hidden).expert_ids // -(-router.num_experts // mesh.size())
    visits = torch.stack([(owner == rank).any(1) for rank in range(mesh.size())], dim=1)  # [T, ranks]
    rank = mesh.get_local_rank()
    parts = list(visits.tensor_split(mesh.size()))
    mine = parts.pop(rank)
    there = int(mine.sum() - mine[:, rank].sum())
    back = sum(int(part[:, rank].sum()) for part in parts)
    return (there + back) * hidden.shape[1] * hidden.element_size()


def _layer(shape: LayerShape, dtype: torch.dtype, device: str) -> SparseMLP:
    torch.manual_seed(0)
    return SparseMLP(
        shape.hidden_size,
        shape.ffn_size,
        shape.num_experts,
        shape.top_k,
        activation=shape.activation,
        gated=shape.gated,
        bias=shape.bias,
        dtype=dtype,
        device=device,
    )


def _with_threads(threads: int, run: Callable[[], None]) -> Callable[[], None]:
    def with_threads() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(before)

    return with_threads


def _nothing() -> None:
    pass


def _inference(layer: nn.Module, hidden: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(hidden)

    return run


def _training(layer: nn.Module, hidden: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        found = layer(hidden.detach().requires_grad_())
        out = found[0] if isinstance(found, tuple) else found
        out.backward(torch.ones_like(out))

    return run


def _in_turns(runs: dict[str, Callable[[], None]], mesh: Any, budget: float) -> dict[str, float]:
    times: dict[str, list[float]] = {way: [] for way in runs}
    end = time.perf_counter() + budget * len(runs)
    for run in runs.values():
        run()
    while True:
        for way, run in runs.items():
            dist.barrier(group=mesh.get_group())
            start = time.perf_counter()
            run()
            _finish(mesh.device_type)
            times[way].append(time.perf_counter() - start)
        # All ranks stop in the same turn.
        more = torch.tensor(float(time.perf_counter() < end), device=mesh.device_type)
        dist.all_reduce(more, dist.ReduceOp.MIN, group=mesh.get_group())
        if not more:
            break
    medians = torch.tensor([statistics.median(found) for found in times.values()], device=mesh.device_type)
    dist.all_reduce(medians, dist.ReduceOp.MAX, group=mesh.get_group())
    return dict(zip(times, medians.tolist(), strict=True))


def _finish(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()
