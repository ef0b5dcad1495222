"""A check that cannot fail is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels import ops
from moekernels.cli.checks import check_layers
from moekernels.models import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from moekernels.nn import GroupedExperts

IDS = torch.arange(40).view(2, 20)


def olmoe(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = OlmoeConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.2,
        eos_token_id=2,
    )
    return OlmoeForCausalLM.from_config(config, dtype=dtype).eval(), {"input_ids": IDS}


def phimoe(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = PhimoeConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=6,
        initializer_range=0.2,
        # Near-ties that weigh in.
        router_jitter_noise=0.2,
    )
    return PhimoeForCausalLM.from_config(config, dtype=dtype).eval(), {"input_ids": IDS}


def nllb(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = NllbMoeConfig(
        vocab_size=50,
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        num_experts=6,
        init_std=0.2,
    )
    model = NllbMoeForConditionalGeneration.from_config(config, dtype=dtype).eval()
    return model, {"input_ids": IDS, "decoder_input_ids": IDS}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (olmoe, ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (phimoe, ["model.layers.0.block_sparse_moe"]),
        (nllb, ["model.encoder.layers.0.ffn", "model.decoder.layers.0.ffn"]),
    ],
)
def test_good_layers_pass(make: Any, layers: list[str], dtype: torch.dtype) -> None:
    checks = check_layers(*make(dtype))
    assert [check.layer for check in checks] == layers
    for check in checks:
        assert check.passed and check.misrouted == 0 and 0 < check.error <= check.allowed


def test_a_wrong_output_fails(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_mlp = ops.sparse_mlp

    def slightly_wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        output = sparse_mlp(*arguments, **options).clone()
        output[7] *= 1.2  # one token of many
        return output

    monkeypatch.setattr(ops, "sparse_mlp", slightly_wrong)
    assert [check.passed for check in check_layers(*olmoe(dtype))] == [False, False]


def wrong_id(weights: Tensor, expert_ids: Tensor) -> None:
    expert_ids[7, 1] = (expert_ids[7, 1] + 1) % 6


def swapped_ids(weights: Tensor, expert_ids: Tensor) -> None:
    expert_ids[7] = expert_ids[7].flip(0)


def lost_token(weights: Tensor, expert_ids: Tensor) -> None:
    expert_ids[7] = -1


def wrong_weight(weights: Tensor, expert_ids: Tensor) -> None:
    weights[7, 1] *= 1.05


def spoil_routing(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor, Tensor], None]) -> None:
    """Let the routing op return what `spoil` makes of weights and expert ids."""
    route = ops.route

    def spoilt(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        # In place, and so in what was recorded too.
        weights, expert_ids = route(*arguments, **options)
        spoil(weights, expert_ids)
        return weights, expert_ids

    monkeypatch.setattr(ops, "route", spoilt)


@pytest.mark.parametrize("spoil", [wrong_id, swapped_ids, lost_token, wrong_weight])
def test_a_wrong_routing_fails(
    spoil: Callable[[Tensor, Tensor], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_routing(monkeypatch, spoil)
    checks = check_layers(*olmoe(dtype))
    assert [(check.misrouted, check.passed) for check in checks] == [(1, False), (1, False)]
    # The experts did as they were told.
    assert all(check.error <= check.allowed for check in checks)


def test_probabilities_that_round_alike_may_come_in_either_order(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = nllb(dtype)
    with torch.no_grad():
        for router in (model.model.encoder.layers[0].ffn.router, model.model.decoder.layers[0].ffn.router):
            router.classifier.weight[1] = router.classifier.weight[0] * 1.001

    def exchange_first_two(weights: Tensor, expert_ids: Tensor) -> None:
        expert_ids[...] = torch.where((expert_ids == 0) | (expert_ids == 1), 1 - expert_ids, expert_ids)

    assert all(check.passed for check in check_layers(model, inputs))
    spoil_routing(monkeypatch, exchange_first_two)
    checks = check_layers(model, inputs)
    # The router rounds probabilities to the dtype of the tokens.
    assert [check.misrouted == 0 for check in checks] == [dtype == torch.bfloat16] * 2


def test_the_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    model, inputs = olmoe(dtype)
    check_layers(model, inputs)
    with pytest.raises(IndexError):
        check_layers(model, {"input_ids": IDS + 1000})
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    assert experts and not any(module._forward_hooks for module in experts)
