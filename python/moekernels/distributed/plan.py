"""What experts on many GPUs would take, calculated: bytes of a rank, bytes that travel, and their time on a link.

    python -m moekernels.distributed.plan --model olmoe-1b-7b --gpus 8 64 512

A calculation from sizes and published rates, and not a measurement. What a layer sends is what
:class:`moekernels.distributed.ExchangingDispatcher` sends, to the byte, for routing that is drawn evenly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The sizes of a model that matter here.

    Attributes:
        dense_weights: that every rank holds.
        sparse_layers, num_experts, top_k: layers with experts, and of each of them experts, and choices of a token.
        expert_weights: of one expert.
        hidden_size: width of a token.
    """

    name: str
    dense_weights: int
    sparse_layers: int
    num_experts: int
    top_k: int
    expert_weights: int
    hidden_size: int


def olmoe_1b_7b() -> Model:
    """OLMoE-1B-7B: 16 layers of 64 experts of 2048 -> 1024, gated."""
    hidden, ffn, layers, vocab = 2048, 1024, 16, 50304
    attention = layers * (4 * hidden * hidden + 4 * hidden + 64 * hidden)  # projections, norms, router
    return Model("olmoe-1b-7b", 2 * vocab * hidden + hidden + attention, layers, 64, 8, 3 * hidden * ffn, hidden)


def nllb_moe_54b() -> Model:
    """NLLB-MoE-54B: every fourth of 24 + 24 layers has 128 experts of 2048 -> 8192."""
    hidden, ffn, vocab, experts = 2048, 8192, 256206, 128
    expert = 2 * hidden * ffn + ffn + hidden
    attention, norm = 4 * (hidden * hidden + hidden), 2 * hidden
    encoder = 24 * (attention + 2 * norm) + 18 * expert + 6 * experts * hidden
    decoder = 24 * (2 * attention + 3 * norm) + 18 * expert + 6 * experts * hidden
    return Model("nllb-moe-54b", vocab * hidden + encoder + decoder + 2 * norm, 12, experts, 2, expert, hidden)


MODELS = {model.name: model for model in (olmoe_1b_7b(), nllb_moe_54b())}


@dataclass(frozen=True)
class Cluster:
    """GPUs in hosts.

    Attributes:
        gpus_per_host: GPUs that a fast link joins.
        link: bytes per second out of a GPU within its host, in one direction.
        network: the same between hosts.

    The defaults are published rates: NVLink of an H200, 900 GB/s both ways, and one 400 Gb/s adapter per GPU.
    """

    gpus_per_host: int = 8
    link: float = 450e9
    network: float = 50e9


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` calculates, for one rank.

    Attributes:
        weight_bytes: dense part and its share of the experts.
        ranks_per_token: to how many ranks a token goes, on average.
        sent_bytes: in one sparse layer's forward pass, tokens there and answers back, without what stays on the rank.
        layer_seconds: for these on the slower of both links.
        step_seconds: for all sparse layers, forward.
    """

    gpus: int
    weight_bytes: int
    ranks_per_token: float
    sent_bytes: float
    layer_seconds: float
    step_seconds: float


def ranks_per_token(num_experts: int, top_k: int, ranks: int) -> float:
    """The mean number of ranks that hold an expert of a token whose `top_k` experts are drawn evenly."""
    held = _held(num_experts, ranks)
    total = 0.0
    for count in held:
        none = 1.0
        for i in range(top_k):
            none *= max(num_experts - count - i, 0) / (num_experts - i)
        total += 1.0 - none
    return total


def _held(num_experts: int, ranks: int) -> list[int]:
    share = -(-num_experts // ranks)
    return [max(min(share, num_experts - rank * share), 0) for rank in range(ranks)]


def estimate(
    model: Model,
    gpus: int,
    tokens: int,
    *,
    cluster: Cluster | None = None,
    bytes_per_weight: float = 2,
    sums: str = "exact",
) -> Estimate:
    """Calculate what a rank holds and sends.

    Args:
        model: sizes.
        gpus: ranks of the expert-parallel mesh; beyond the number of experts the mesh is repeated, and a token stays
            within its copy.
        tokens: of one rank in one layer.
        cluster: the machines.
        bytes_per_weight: 2 for bfloat16.
        sums: as of :func:`moekernels.distributed.expert_parallel`.

    Raises:
        ValueError: a number is not positive.
    """
    for name, value in (("gpus", gpus), ("tokens", tokens), ("bytes_per_weight", bytes_per_weight)):
        if not value > 0:
            raise ValueError(f"estimate: {name} must be positive, got {value}")
    where = cluster or Cluster()
    ranks = min(gpus, model.num_experts)
    held = max(_held(model.num_experts, ranks))
    weights = model.dense_weights + model.sparse_layers * held * model.expert_weights
    visited = ranks_per_token(model.num_experts, model.top_k, ranks)
    token_bytes = 2 * model.hidden_size
    label_bytes = 4 * (2 * model.top_k + 1)
    # A token whose experts are all on one rank comes back as one row, also with exact sums; the others once per choice.
    together = _all_on_one_rank(model.num_experts, model.top_k, ranks)
    answers = visited if sums == "partial" else together + (1 - together) * model.top_k
    away = 1 - 1 / ranks
    sent = tokens * away * (visited * (token_bytes + label_bytes) + answers * token_bytes)
    on_host = min(where.gpus_per_host, ranks) / ranks
    outside = 1 - on_host
    within = max(on_host - 1 / ranks, 0.0)
    share_outside = outside / away if away else 0.0
    share_within = within / away if away else 0.0
    seconds = max(sent * share_outside / where.network, sent * share_within / where.link)
    return Estimate(
        gpus, int(weights * bytes_per_weight), visited, sent, seconds, seconds * model.sparse_layers
    )  # fmt: skip


def _all_on_one_rank(num_experts: int, top_k: int, ranks: int) -> float:
    total = 0.0
    for count in _held(num_experts, ranks):
        chance = 1.0
        for i in range(top_k):
            chance *= max(count - i, 0) / (num_experts - i)
        total += chance
    return total


def table(model: Model, gpus: Sequence[int], tokens: int, sums: str = "exact") -> str:
    """One line per number of GPUs."""
    lines = [
        f"{model.name}, {tokens} tokens a GPU, bfloat16, sums {sums!r}: a calculation, not a measurement",
        "GPUs   weights a GPU   ranks a token   sent a layer   time a layer   time a step",
    ]
    for number in gpus:
        found = estimate(model, number, tokens, sums=sums)
        lines.append(
            f"{number:4}   {found.weight_bytes / 2**30:9.1f} GiB   {found.ranks_per_token:13.2f}   "
            f"{found.sent_bytes / 2**20:8.1f} MiB   {1e6 * found.layer_seconds:9.0f} us   "
            f"{1e3 * found.step_seconds:8.2f} ms"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m moekernels.distributed.plan`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="olmoe-1b-7b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tokens", type=int, default=4096, help="of one GPU (default: 4096)")
    parser.add_argument("--sums", choices=("exact", "partial"), default="exact")
    args = parser.parse_args(argv)
    print(table(MODELS[args.model], args.gpus, args.tokens, args.sums))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
