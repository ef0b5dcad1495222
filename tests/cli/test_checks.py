"""A check that cannot fail is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekernels import ops
from moekernels.cli.checks import check_layers
from moekernels.models import NllbMoeConfig, NllbMoeForConditionalGeneration, OlmoeConfig, OlmoeForCausalLM
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
        (nllb, ["model.encoder.layers.0.ffn", "model.decoder.layers.0.ffn"]),
    ],
)
def test_good_layers_pass(make: Any, layers: list[str], dtype: torch.dtype) -> None:
    checks = check_layers(*make(dtype))
    assert [check.layer for check in checks] == layers
    for check in checks:
        assert check.passed and 0 < check.error <= check.allowed


def test_a_wrong_output_fails(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_mlp = ops.sparse_mlp

    def slightly_wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        output = sparse_mlp(*arguments, **options).clone()
        output[7] *= 1.2  # one token of many
        return output

    monkeypatch.setattr(ops, "sparse_mlp", slightly_wrong)
    assert [check.passed for check in check_layers(*olmoe(dtype))] == [False, False]


def test_the_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    model, inputs = olmoe(dtype)
    check_layers(model, inputs)
    with pytest.raises(IndexError):
        check_layers(model, {"input_ids": IDS + 1000})
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    assert experts and not any("forward_fused" in module.__dict__ for module in experts)
