"""Classes found by the name of an architecture, in directories and in the Hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moekernels as mk
from moekernels.checkpoint import CheckpointError
from moekernels.models.auto import ARCHITECTURES
from tests.models.tiny import CONFIGS, base_class, head_class, inputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

AUTO = {
    "base": mk.AutoModel,
    "causal_lm": mk.AutoModelForCausalLM,
    "seq2seq_lm": mk.AutoModelForSeq2SeqLM,
    "sequence_classification": mk.AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_classes(name: str, tmp_path: Path) -> None:
    model = head_class(name)(CONFIGS[name]).eval()
    model.save_pretrained(tmp_path)
    config = mk.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(CONFIGS[name])
    assert type(mk.AutoConfig.for_model(name)) is type(CONFIGS[name])
    with torch.no_grad():
        expected = model(**inputs(name)).logits
    for role, auto in AUTO.items():
        wanted = getattr(ARCHITECTURES[name], role)
        if wanted is None:
            with pytest.raises(ValueError, match=rf"{auto.__name__}: no such model for {type(config).__name__}; there"):
                auto.from_pretrained(tmp_path)
        elif role == "sequence_classification":
            with pytest.warns(UserWarning, match=r"the checkpoint has no score.weight; initialised, to be trained"):
                assert type(auto.from_pretrained(tmp_path)) is wanted
        else:
            assert type(auto.from_config(config)) is wanted
            found = auto.from_pretrained(tmp_path)
            assert type(found) is wanted and found.name_or_path == str(tmp_path)
            if role != "base":
                with torch.no_grad():
                    assert torch.equal(found(**inputs(name)).logits, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_transformers(name: str) -> None:
    config = transformers.AutoConfig.for_model(name)
    for ours, theirs in (
        (type(CONFIGS[name]), type(config)),
        (base_class(name), transformers.MODEL_MAPPING[type(config)]),
    ):
        assert ours.__name__ == theirs.__name__
    mapping = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder
        else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    assert head_class(name).__name__ == mapping[type(config)].__name__


def test_options_reach_the_model(tmp_path: Path) -> None:
    head_class("olmoe")(CONFIGS["olmoe"]).save_pretrained(tmp_path / "inner")
    load = mk.AutoModelForCausalLM.from_pretrained
    model = load(
        tmp_path, subfolder="inner", dtype="auto", device_map="auto", attn_implementation="eager",
        low_cpu_mem_usage=True, trust_remote_code=True, revision="main", token=None, use_safetensors=True,
    )  # fmt: skip
    assert model.config._attn_implementation == "eager" and model.dtype == torch.float32
    assert not hasattr(model.config, "trust_remote_code")
    config = mk.AutoConfig.from_pretrained(tmp_path, subfolder="inner", trust_remote_code=True, clip_qkv=2.0)
    assert config.clip_qkv == 2.0 and not hasattr(config, "trust_remote_code")
    assert load(tmp_path / "inner", config=config).config.clip_qkv == 2.0
    assert load(tmp_path / "inner", config=tmp_path / "inner" / "config.json").config.clip_qkv is None
    for auto in AUTO.values():
        with pytest.raises(ValueError, match=r"without a checkpoint there must be a config"):
            auto.from_pretrained(None)
        with pytest.raises(TypeError, match=rf"use {auto.__name__}.from_pretrained"):
            auto()


def test_by_name_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "allenai/OLMoE-1B-7B-0924"
    model = head_class("olmoe")(CONFIGS["olmoe"]).eval()
    model.generation_config.max_new_tokens = 7
    home = tmp_path / "models--allenai--OLMoE-1B-7B-0924"
    model.save_pretrained(home / "saved", max_shard_size="5KB")
    (home / "blobs").mkdir()
    (home / "snapshots" / "c0ffee").mkdir(parents=True)
    for path in (home / "saved").iterdir():
        path.rename(home / "blobs" / path.name)
        (home / "snapshots" / "c0ffee" / path.name).symlink_to(home / "blobs" / path.name)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("c0ffee")
    with torch.no_grad():
        expected = model(**inputs("olmoe")).logits
        for load in (mk.AutoModelForCausalLM.from_pretrained, mk.OlmoeForCausalLM.from_pretrained):
            found = load(name, cache_dir=tmp_path)
            assert torch.equal(found(**inputs("olmoe")).logits, expected)
            assert found.generation_config.max_new_tokens == 7
            assert found.name_or_path == found.config.name_or_path == name
    assert mk.GenerationConfig.from_pretrained(name, cache_dir=tmp_path, top_k=3).max_new_tokens == 7
    # The usual place, without any argument.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert type(mk.AutoModel.from_pretrained(name)) is mk.OlmoeModel
    with pytest.raises(CheckpointError, match="no complete revision 'v2'"):
        mk.AutoModel.from_pretrained(name, revision="v2")


@pytest.mark.parametrize("model_type", ["gpt2", None, 3])
def test_unknown_architecture(tmp_path: Path, model_type: Any) -> None:
    # Nothing of a checkpoint is executed, whatever its configuration asks for.
    witness = tmp_path / "executed"
    (tmp_path / "modeling_other.py").write_text(f"open({str(witness)!r}, 'w')")
    auto_map = {"AutoConfig": "modeling_other.Config", "AutoModelForCausalLM": "modeling_other.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    for load in (mk.AutoConfig.from_pretrained, mk.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"config.json: unknown architecture: model_type must be one of 'olmoe', .*'nllb-moe'"
        ):
            load(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="unknown architecture: model_type must be one of 'olmoe'"):
        mk.AutoConfig.for_model(model_type)
    assert not witness.exists()


def test_remote_code_is_not_executed_for_known_architectures_either(tmp_path: Path) -> None:
    head_class("olmoe")(CONFIGS["olmoe"]).save_pretrained(tmp_path)
    witness = tmp_path / "executed"
    (tmp_path / "modeling_other.py").write_text(f"open({str(witness)!r}, 'w')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(mk.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is mk.OlmoeForCausalLM
    assert not witness.exists()


def test_infer_device() -> None:
    assert mk.infer_device() == transformers.infer_device()
