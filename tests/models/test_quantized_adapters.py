"""PEFT's adapters beside quantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekernels import OlmoeConfig, OlmoeForCausalLM
from moekernels.models.quantization import Quantization
from moekernels.models.quantized import quantize_model
from moekernels.quantization import parse_format

peft = pytest.importorskip("peft")

CONFIG: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1, "eos_token_id": 2},
}


def _model() -> OlmoeForCausalLM:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**CONFIG))
    quantize_model(model, Quantization(parse_format("int4")))
    return model


def test_adapters_of_linears_are_trained_and_the_rest_is_not() -> None:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    model = peft.get_peft_model(_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        before = model(ids).logits
    model(ids, labels=ids).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and all("lora" in name for name in trained)
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1.0).step()
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(RuntimeError, match=r"add_.* does not work on a quantised weight; .* or call dequantize\(\)"):
        model.merge_and_unload()


def test_adapters_of_stacks_are_an_error() -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = peft.get_peft_model(_model(), config)
    with pytest.raises(RuntimeError, match="does not work on a quantised weight"):
        model(torch.tensor([[3, 4, 5]]))
