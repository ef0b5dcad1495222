"""Quantised weights are asked for in several ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import AutoModelForCausalLM, BitsAndBytesConfig, OlmoeForCausalLM, QuantizationConfig
from tests.models import tiny


@pytest.mark.parametrize(
    ("kwargs", "format"),
    [
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "int8"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float16}, "fp4"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4"),
        ({"quantization_config": QuantizationConfig("int8"), "dtype": "bfloat16"}, "int8"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "fp4"),
    ],
)
def test_ways_to_ask(saved_olmoe: Callable[..., Any], kwargs: dict[str, Any], format: str) -> None:
    saved = saved_olmoe()
    for made in (AutoModelForCausalLM, OlmoeForCausalLM):
        model = made.from_pretrained(saved.directory, **kwargs)
        experts = model.model.layers[0].mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj, model.model.layers[1].self_attn.k_proj.weight):
            assert weight.format.name == format
        assert model.dtype == getattr(torch, str(kwargs.get("dtype", "float32")).removeprefix("torch."))
        assert model.config.quantization_config


@pytest.mark.parametrize("kind", ["olmoe", "nllb-moe"])
def test_compute_dtype(kind: str, tmp_path: Path) -> None:
    """Products are computed in it, with biases too; what comes out of a layer has the model's dtype."""
    model = tiny.head_class(kind)(tiny.CONFIGS[kind]).eval()
    model.save_pretrained(tmp_path)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")
        loaded = tiny.head_class(kind).from_pretrained(tmp_path, quantization_config=config)
        logits[dtype] = loaded(**tiny.inputs(kind)).logits
        assert logits[dtype].dtype == loaded.dtype == torch.float32
        loaded.save_pretrained(tmp_path / "saved")
        again = tiny.head_class(kind).from_pretrained(tmp_path / "saved")
        assert torch.equal(again(**tiny.inputs(kind)).logits, logits[dtype])
    scale = logits[torch.float32].abs().max()
    assert 1e-6 < (logits[torch.bfloat16] - logits[torch.float32]).abs().max() / scale < 0.05


def test_nothing_asked_for(saved_olmoe: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (None, BitsAndBytesConfig(), {}):
            OlmoeForCausalLM.from_pretrained(saved_olmoe().directory, quantization_config=config, load_in_8bit=False)


def test_fields() -> None:
    kwargs = {"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    theirs, ours = transformers.BitsAndBytesConfig(**kwargs), BitsAndBytesConfig(**kwargs)
    for name in ("load_in_8bit", "load_in_4bit", "llm_int8_threshold", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert BitsAndBytesConfig().bnb_4bit_compute_dtype == torch.float32
    with pytest.raises(ValueError, match="set load_in_4bit or load_in_8bit, not both"):
        BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type must be one of fp4, nf4, got 'int4'"):
        BitsAndBytesConfig(bnb_4bit_quant_type="int4")


def test_fields_in_files() -> None:
    """Both libraries write and read the same."""
    kwargs = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}
    theirs, ours = transformers.BitsAndBytesConfig(**kwargs), BitsAndBytesConfig(**kwargs)
    assert {n: v for n, v in theirs.to_dict().items() if not n.startswith("_")} == ours.to_dict()
    assert BitsAndBytesConfig.from_dict(theirs.to_dict()) == ours
    assert {n: v for n, v in theirs.to_diff_dict().items() if not n.startswith("_")} == ours.to_diff_dict()
    assert (ours.quantization_method(), ours.is_quantizable()) == (theirs.quantization_method(), True)
    own = QuantizationConfig("int4", {"group_size": 64}, skip_modules=["lm_head"], compute_dtype="float16")
    assert QuantizationConfig.from_dict(json.loads(json.dumps(own.to_dict()))) == own


def test_errors(saved_olmoe: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight must be False"):
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    with pytest.raises(ValueError, match="activations goes with load_in_8bit, got 'int8'"):
        BitsAndBytesConfig(load_in_4bit=True, activations="int8")
    with pytest.raises(ValueError, match="int8: activations must be 'int8' or None, got 'int4'"):
        BitsAndBytesConfig(load_in_8bit=True, activations="int4")
    with pytest.raises(ValueError, match=r"int8: threshold must be 0 or a positive number, got -6\.0"):
        BitsAndBytesConfig(load_in_8bit=True, activations="int8", llm_int8_threshold=-6.0)
    with pytest.raises(ValueError, match="llm_int8_skip_modules must be a list of names or None, got 'lm_head'"):
        BitsAndBytesConfig(llm_int8_skip_modules="lm_head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage must be one of uint8, .*, got 'int3'"):
        BitsAndBytesConfig(bnb_4bit_quant_storage="int3")
