from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.checkpoint import CheckpointError
from moekernels.models import (
    M2M100Config,
    NllbMoeConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    SwitchTransformersConfig,
)
from moekernels.models.fields import count


def test_defaults_are_those_of_the_documentation() -> None:
    ours, theirs = OlmoeConfig(), transformers.OlmoeConfig()
    for name in OlmoeConfig().to_dict():
        if name not in ("transformers_version", "torch_dtype"):
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "config_class", [OlmoeConfig, PhimoeConfig, M2M100Config, NllbMoeConfig, SwitchTransformersConfig]
)
def test_fields_are_parameters_and_documented(config_class: type[PretrainedConfig]) -> None:
    parameters = inspect.signature(config_class.__init__).parameters
    names = [*parameters][1:-1]
    made = config_class()
    assert {*names} <= {*made.to_dict()}
    documented = re.findall(r"^    ([*\w]+): \S", config_class.__doc__ or "", re.MULTILINE)
    assert documented == [*names, "**kwargs"]
    assert config_class(*(getattr(made, name) for name in names)) == made
    with pytest.raises(TypeError, match="multiple values for argument 'vocab_size'"):
        config_class(8, vocab_size=8)


def test_configurations_of_others_can_add_fields() -> None:
    class Wider(OlmoeConfig):
        """OLMoE with an adapter."""

        rank: int = count(4, "of the adapter")
        vocab_size: int = count(100, "number of tokens")

    assert [*inspect.signature(Wider).parameters][-3:] == ["rank", "vocab_size", "kwargs"]
    assert Wider(rank=2).rank == 2 and Wider(bos_token_id=3).vocab_size == 100 and OlmoeConfig().vocab_size == 50304
    with pytest.raises(ValueError, match="Wider: rank must be a positive integer, got 0"):
        Wider(rank=0)


def test_files_travel_both_ways(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "pad_token_id": None,
        "use_cache": False,
        "eos_token_id": [3, 4],
        "num_labels": 3,
        "my_field": {"a": [1, 2]},
    }
    OlmoeConfig(**fields, dtype="bfloat16").save_pretrained(tmp_path / "ours")
    transformers.OlmoeConfig(**fields, dtype="bfloat16").save_pretrained(tmp_path / "theirs")
    for theirs in (transformers.OlmoeConfig.from_pretrained(tmp_path / "ours"), transformers.OlmoeConfig(**fields)):
        for ours in (OlmoeConfig.from_pretrained(tmp_path / "theirs"), OlmoeConfig.from_pretrained(tmp_path / "ours")):
            for name in fields:
                assert getattr(ours, name) == getattr(theirs, name) == fields[name], name
            assert ours.dtype == torch.bfloat16
            assert ours.id2label == theirs.id2label
    assert OlmoeConfig.from_pretrained(tmp_path / "ours") == OlmoeConfig.from_pretrained(
        tmp_path / "ours" / "config.json"
    )


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    OlmoeConfig(something_new=[1, {"a": None}]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["something_new"] == [1, {"a": None}]
    assert OlmoeConfig.from_pretrained(tmp_path).something_new == [1, {"a": None}]
    with pytest.raises(AttributeError, match="OlmoeConfig has no attribute 'nothing'"):
        OlmoeConfig().nothing  # noqa: B018


def test_aliases() -> None:
    config = OlmoeConfig(num_local_experts=16)
    assert config.num_experts == config.num_local_experts == 16
    config.num_local_experts = 32
    assert config.num_experts == 32
    assert "num_local_experts" not in config.to_dict()


def test_rotary_parameters_by_either_name() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    old = OlmoeConfig(rope_theta=5e5, rope_scaling=scaling)
    new = OlmoeConfig(rope_parameters={**scaling, "rope_theta": 5e5})
    assert old == new
    assert old.rope_parameters == {**scaling, "rope_theta": 5e5}
    plain = OlmoeConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert plain.rope_scaling is None and plain == OlmoeConfig()


def test_dtype_by_either_name() -> None:
    for fields in ({"dtype": "float16"}, {"torch_dtype": torch.float16}, {"torch_dtype": "torch.float16"}):
        config = OlmoeConfig(**fields)
        assert config.dtype == config.torch_dtype == torch.float16
    config.torch_dtype = "bfloat16"
    assert config.dtype == torch.bfloat16
    assert json.loads(config.to_json_string())["torch_dtype"] == "bfloat16"


def test_labels() -> None:
    assert OlmoeConfig().num_labels == 2
    assert OlmoeConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = OlmoeConfig(id2label={"0": "no", "1": "yes"})
    assert named.label2id == {"no": 0, "yes": 1} and named.num_labels == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100}, "hidden_size must be an even multiple of 16 heads, got 100"),
        ({"hidden_size": "2048"}, "hidden_size must be a positive integer, got '2048'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_experts": True}, "num_experts must be a positive integer, got True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of 16 heads, got 3"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok must be at most num_experts = 64, got 65"),
        ({"attention_dropout": 1.5}, "attention_dropout must be a number from 0.0 to 1.0, got 1.5"),
        ({"clip_qkv": -1.0}, "clip_qkv must be a positive number or None, got -1.0"),
        ({"pad_token_id": 50304}, "pad_token_id must be a token id below vocab_size = 50304, or None, got 50304"),
        ({"hidden_act": "softplus"}, "unknown activation 'softplus'"),
        ({"hidden_act": torch.relu}, "unknown activation"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a dictionary or None, got 'linear'"),
        (
            {"rope_scaling": {"rope_type": "spiral"}},
            "rope_scaling: unknown type 'spiral', expected one of default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling of type 'linear' needs 'factor', got only \['type'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be a number of at least 1, got 0.5"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "must list head_dim / 2 = 64 numbers, got 1",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 63 + ["x"], "long_factor": [1.0] * 64}},
            r"rope_scaling\['short_factor'\]\[63\] must be a positive number, got 'x'",
        ),
        ({"dtype": "int8"}, "floating-point torch dtype"),
    ],
)
def test_unusable_values(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OlmoeConfig(**fields)
    if not callable(fields.get("hidden_act")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", **fields}))
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
            OlmoeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        OlmoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        OlmoeConfig.from_pretrained(tmp_path)
