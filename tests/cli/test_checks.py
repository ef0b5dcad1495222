"""A check that cannot fail is none."""

from __future__ import annotations

import pytest
import torch

from moekernels.cli.checks import check_layers
from moekernels.models import OlmoeConfig, OlmoeForCausalLM
from moekernels.nn import SparseMLP


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> OlmoeForCausalLM:
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
    return OlmoeForCausalLM.from_config(config, dtype=request.param).eval()


IDS = torch.arange(40).view(2, 20)


def test_good_layers_pass(model: OlmoeForCausalLM) -> None:
    checks = check_layers(model, IDS)
    assert [check.layer for check in checks] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for check in checks:
        assert check.passed and check.routed and 0 < check.error <= check.allowed


def test_a_wrong_output_fails(model: OlmoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SparseMLP.forward

    def slightly_wrong(layer: SparseMLP, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> tuple:
        output, logits = forward(layer, hidden, mask)
        output = output.clone()
        output[0, 7] *= 1.2  # one token of many
        return output, logits

    monkeypatch.setattr(SparseMLP, "forward", slightly_wrong)
    assert [check.passed for check in check_layers(model, IDS)] == [False, False]


def test_a_wrong_expert_fails(model: OlmoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = type(model.model.layers[0].mlp.gate)
    forward = gate.forward

    def other_expert(router: torch.nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> tuple:
        routing = forward(router, hidden, mask)
        ids = routing.expert_ids.clone()
        ids[3, 0] = (ids[3, 0] + 1) % 6
        return routing._replace(expert_ids=ids)

    monkeypatch.setattr(gate, "forward", other_expert)
    assert [check.routed for check in check_layers(model, IDS)] == [False, False]


def test_hooks_are_gone(model: OlmoeForCausalLM) -> None:
    check_layers(model, IDS)
    with pytest.raises(IndexError):
        check_layers(model, IDS + 1000)
    assert not any(module._forward_hooks for module in model.modules())
