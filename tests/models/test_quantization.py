"""Quantised weights are asked for in several ways; the answer is a warning, or an error before anything is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import AutoModelForCausalLM, BitsAndBytesConfig, OlmoeForCausalLM


@pytest.mark.parametrize(
    ("kwargs", "bits", "times"),
    [
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 8, 4),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float16}, 4, 4),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, 4, 8),
        ({"load_in_8bit": True, "dtype": "bfloat16"}, 8, 2),
        ({"load_in_4bit": True}, 4, 8),
    ],
)
def test_a_warning(saved_olmoe: Callable[..., Any], kwargs: dict[str, Any], bits: int, times: int) -> None:
    saved = saved_olmoe()
    for made in (AutoModelForCausalLM, OlmoeForCausalLM):
        with pytest.warns(UserWarning, match=f"not quantised to {bits} bits.*take {times} times the memory"):
            model = made.from_pretrained(saved.directory, **kwargs)
        plain = made.from_pretrained(saved.directory, dtype=kwargs.get("dtype", "auto"))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


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


def test_errors(saved_olmoe: Callable[..., Any], tmp_path: Path) -> None:
    source = saved_olmoe().directory
    with pytest.raises(ValueError, match="quantization_config must be a BitsAndBytesConfig, got str"):
        OlmoeForCausalLM.from_pretrained(source, quantization_config="int8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"its weights are quantised \(bitsandbytes\), which is not supported"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
