"""The calculator of what many GPUs would hold and send, against counting."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import moekernels as mk
from moekernels.distributed import held_experts, plan

LARGE: dict[str, Any] = {
    "olmoe-1b-7b": lambda: mk.OlmoeForCausalLM(mk.OlmoeConfig(intermediate_size=1024)),
    "nllb-moe-54b": lambda: mk.NllbMoeForConditionalGeneration(
        mk.NllbMoeConfig(
            vocab_size=256206,
            d_model=2048,
            encoder_layers=24,
            decoder_layers=24,
            encoder_ffn_dim=8192,
            decoder_ffn_dim=8192,
            num_experts=128,
            encoder_sparse_step=4,
            decoder_sparse_step=4,
        )
    ),
}


@pytest.mark.parametrize("name", plan.MODELS)
def test_weights_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = LARGE[name]()
    found = plan.MODELS[name]
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    assert found.sparse_layers * found.num_experts * found.expert_weights == experts
    assert found.dense_weights == sum(p.numel() for p in model.parameters()) - experts
    alone = plan.estimate(found, 1, 10)
    assert alone.weight_bytes == 2 * (found.dense_weights + experts) and alone.sent_bytes == 0


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(6, 3, 4), (5, 2, 2), (4, 1, 4)])
def test_a_token_visits_so_many_ranks(experts: int, top_k: int, ranks: int) -> None:
    owner = {e: rank for rank in range(ranks) for e in held_experts(experts, ranks, rank)}
    visits = [len({owner[e] for e in chosen}) for chosen in itertools.combinations(range(experts), top_k)]
    assert plan.ranks_per_token(experts, top_k, ranks) == pytest.approx(sum(visits) / len(visits))


def test_more_gpus_hold_less_and_send_more() -> None:
    for model in plan.MODELS.values():
        few, many, repeated = (plan.estimate(model, gpus, 4096) for gpus in (8, 64, 512))
        assert few.weight_bytes > many.weight_bytes >= repeated.weight_bytes
        assert few.sent_bytes < many.sent_bytes <= repeated.sent_bytes


def test_errors() -> None:
    model = plan.MODELS["olmoe-1b-7b"]
    with pytest.raises(ValueError, match="gpus must be positive, got 0"):
        plan.estimate(model, 0, 1)
    with pytest.raises(ValueError, match="tokens must be positive, got -1"):
        plan.estimate(model, 8, -1)
