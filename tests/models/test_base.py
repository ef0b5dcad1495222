"""What all models share, shown on OLMoE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.checkpoint import CheckpointError
from moekernels.generation import GenerationConfig
from moekernels.models import AutoConfig, AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM
from tests.models.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


@pytest.fixture
def directory(saved_olmoe: Callable[..., Any]) -> Path:
    return saved_olmoe().directory


def tiny(**overrides: Any) -> OlmoeForCausalLM:
    return OlmoeForCausalLM(OlmoeConfig(**{**TINY, **overrides})).eval()


# Loading.


def test_dtype(directory: Path) -> None:
    load = OlmoeForCausalLM.from_pretrained
    assert load(directory).dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        model = load(directory, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == model.config.torch_dtype == torch.bfloat16
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert load(directory, torch_dtype=torch.float16).dtype == torch.float16
    for wrong in ("int8", "nonsense", torch.int64, 3):
        with pytest.raises(ValueError, match='dtype must be "auto", a floating-point torch dtype'):
            load(directory, dtype=wrong)


def test_auto_dtype_follows_the_configuration_then_the_weights(tmp_path: Path) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("torch_dtype") == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_device(directory: Path) -> None:
    load = OlmoeForCausalLM.from_pretrained
    for arguments in ({"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": torch.device("cpu")}}):
        assert load(directory, **arguments).device == torch.device("cpu")
    with pytest.raises(ValueError, match="pass device or device_map, not both"):
        load(directory, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="device_map: no device for lm_head"):
        load(directory, device_map={"model": "cpu"})
    with pytest.raises(ValueError, match="no such device: 'cuda:99'; this machine has"):
        load(directory, device_map={"": 99})
    with pytest.raises(ValueError, match="not a device: 'nowhere'"):
        load(directory, device="nowhere")


def test_keywords_override_the_configuration(directory: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(directory, norm_topk_prob=True, local_files_only=True)
    assert model.config.norm_topk_prob and model.model.layers[0].mlp.router.renormalize
    assert OlmoeForCausalLM.from_pretrained(directory, clip_qkv=0.5).config.clip_qkv == 0.5
    assert (
        OlmoeForCausalLM.from_pretrained(directory, eos_token_id=None, quantization_config=None).config.eos_token_id
        is None
    )
    with pytest.raises(ValueError, match="neither arguments nor fields of the configuration: no_such_field"):
        OlmoeForCausalLM.from_pretrained(directory, no_such_field=1)
    with pytest.raises(ValueError, match="num_experts_per_tok must be at most num_experts = 8, got 9"):
        OlmoeForCausalLM.from_pretrained(directory, num_experts_per_tok=9)


def test_a_given_configuration_is_not_changed(directory: Path) -> None:
    config = OlmoeConfig.from_pretrained(directory)
    before = config.to_dict()
    model = OlmoeForCausalLM.from_pretrained(directory, config=config, attn_implementation="eager", dtype="bfloat16")
    assert model.config._attn_implementation == "eager"
    assert config.to_dict() == before and config._attn_implementation is None


def test_attention_implementation(directory: Path) -> None:
    assert OlmoeForCausalLM.from_pretrained(directory).config._attn_implementation == "sdpa"
    with pytest.raises(
        ValueError,
        match=r"attn_implementation must be one of sdpa, eager, flash_attention_2, got 'flash_attention_3'.*flash",
    ):
        OlmoeForCausalLM.from_pretrained(directory, attn_implementation="flash_attention_3")


def test_loaded_models_are_in_evaluation_mode(directory: Path) -> None:
    assert not OlmoeForCausalLM.from_pretrained(directory).training


def test_not_a_directory() -> None:
    for load in (OlmoeForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"no such checkpoint directory: 'allenai/OLMoE-1B-7B-0924'.*looked in"
        ):
            load("allenai/OLMoE-1B-7B-0924")


def test_other_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phimoe"}))
    with pytest.raises(CheckpointError, match="model_type must be 'olmoe' for OlmoeConfig, got 'phimoe'"):
        OlmoeForCausalLM.from_pretrained(tmp_path)


def test_wrong_configuration_class() -> None:
    with pytest.raises(TypeError, match="config must be a OlmoeConfig, got dict"):
        OlmoeForCausalLM({})  # type: ignore[arg-type]


# Saving.


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_write(tmp_path: Path, token_ids: Tensor, max_shard_size: str, tied: bool) -> None:
    ours = tiny(tie_word_embeddings=tied, num_key_value_heads=2, rope_scaling={"rope_type": "linear", "factor": 2.0})
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    theirs, report = transformers.OlmoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(theirs(token_ids).logits, ours(token_ids).logits, atol=1e-5, rtol=0)


def test_round_trip_is_exact(directory: Path, tmp_path: Path) -> None:
    first = OlmoeForCausalLM.from_pretrained(directory)
    first.save_pretrained(tmp_path)
    again = OlmoeForCausalLM.from_pretrained(tmp_path)
    for (name, mine), (_, other) in zip(again.named_parameters(), first.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert again.config == first.config
    # What a file of transformers holds, key by key.
    theirs = transformers.OlmoeForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in transformers.OlmoeForCausalLM.from_pretrained(directory).state_dict().items():
        assert torch.equal(theirs[name], tensor), name


def test_generation_config_travels_with_the_model(tmp_path: Path) -> None:
    model = tiny()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 3])
    model.save_pretrained(tmp_path)
    again = OlmoeForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.max_new_tokens == 7
    assert again.generation_config.eos_token_id == [2, 3]
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json"):
        OlmoeForCausalLM.from_pretrained(tmp_path)


def test_a_failing_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(OlmoeConfig, "to_json_file", fail)
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Weights.


def test_new_weights() -> None:
    model = tiny(initializer_range=0.02, hidden_size=64, attention_bias=True)
    layer = model.model.layers[0]
    for weight in (
        layer.mlp.router.weight,
        layer.mlp.experts.gate_up_proj,
        layer.mlp.experts.down_proj,
        model.lm_head.weight,
    ):
        assert math.isclose(weight.std().item(), 0.02, rel_tol=0.1)
        assert abs(weight.mean().item()) < 0.003
    assert (layer.self_attn.q_proj.bias == 0).all()
    assert (layer.input_layernorm.weight == 1).all()
    assert (model.get_input_embeddings().weight[TINY["pad_token_id"]] == 0).all()


def test_number_of_parameters(directory: Path) -> None:
    ours = OlmoeForCausalLM.from_pretrained(directory)
    theirs = transformers.OlmoeForCausalLM.from_pretrained(directory)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    ours.lm_head.weight.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == ours.num_parameters() - ours.lm_head.weight.numel()
    assert tiny(tie_word_embeddings=True).num_parameters() == ours.num_parameters() - ours.lm_head.weight.numel()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [120, 50])
def test_resize_token_embeddings(tied: bool, size: int) -> None:
    model = tiny(tie_word_embeddings=tied)
    ids = torch.randint(3, 50, (1, 4))
    with torch.no_grad():
        before = model(ids).logits
        embedding = model.resize_token_embeddings(size)
        after = model(ids).logits
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == model.get_output_embeddings().weight.shape == (size, 32)
    assert (embedding.weight is model.lm_head.weight) == tied
    assert model.config.vocab_size == model.lm_head.out_features == after.shape[-1] == size
    kept = min(size, 97)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])


def test_resize_to_a_multiple() -> None:
    model = tiny()
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 128
    assert model.resize_token_embeddings(128) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="at least one token, got 0"):
        model.resize_token_embeddings(0)


def test_replacing_the_embeddings() -> None:
    model = tiny(tie_word_embeddings=True)
    new = torch.nn.Embedding(97, 32)
    model.set_input_embeddings(new)
    model.tie_weights()
    assert model.get_input_embeddings() is new and model.lm_head.weight is new.weight


def test_frequencies_do_not_follow_into_another_dtype() -> None:
    model = tiny()
    expected = model.model.rotary_emb.inv_freq.clone()
    for moved in (model.half(), model.to(torch.bfloat16), model.double(), model.float()):
        assert torch.equal(moved.model.rotary_emb.inv_freq, expected)


def test_models_are_built_on_the_default_device() -> None:
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**TINY))
    assert all(parameter.is_meta for parameter in model.parameters())
