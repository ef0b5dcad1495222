"""Experts of transformers' models held in few bits: `replace_moe_layers(model, weights=...)`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from moekernels.integrations.transformers import replace_moe_layers, restore_moe_layers
from moekernels.quantization import QuantizedWeight

CONFIG: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
}


def _model() -> Any:
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**CONFIG)).eval()


def _experts(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if "experts" in name}


@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "q8_0"])
def test_logits(format: str) -> None:
    """Those of the model with the values that the weights have then; attention and router stay as they were."""
    model = _model()
    plain = copy.deepcopy(model)
    whole = replace_moe_layers(copy.deepcopy(model)).expert_bytes
    report = replace_moe_layers(model, weights=format)
    assert not report.by_modules and report.expert_bytes < 0.3 * whole
    for name, weight in model.named_parameters():
        assert isinstance(weight, QuantizedWeight) == ("experts" in name), name
        if isinstance(weight, QuantizedWeight):
            plain.get_parameter(name).data = weight.dequantize()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert restore_moe_layers(model) == sum(report.classes.values())
        if any(name.endswith("gate_up_proj") for name, _ in model.named_parameters()):  # stacks: transformers 5
            with pytest.raises(RuntimeError, match=r"does not work on a quantised weight; .* call dequantize"):
                model(ids)
        else:
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_again_and_errors() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"replace_moe_layers: weights: format must be one of .*; got 'int3'"):
        replace_moe_layers(model, weights="int3")
    with pytest.raises(ValueError, match=r"layers.0.mlp.* the last dimension .* multiple of 256, .* got 64"):
        replace_moe_layers(model, weights="q4_k")
    assert not any(isinstance(weight, QuantizedWeight) for weight in model.parameters())
    replace_moe_layers(model, weights="int4")
    before = _experts(model)
    restore_moe_layers(model)
    replace_moe_layers(model, weights="int8")  # which are quantised already
    assert all(weight is before[name] for name, weight in _experts(model).items())


def test_adapters_beside() -> None:
    """The weights are frozen, and what lies before them learns."""
    model = _model()
    replace_moe_layers(model, weights="int4")
    assert not any(weight.requires_grad for weight in _experts(model).values())
    ids = torch.arange(3, 12)[None]
    model(ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    router = model.model.layers[0].mlp.gate.weight
    assert not isinstance(router, QuantizedWeight) and router.grad is not None and gradient.abs().max() > 0
