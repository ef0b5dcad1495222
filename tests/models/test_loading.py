"""What `from_pretrained` and `save_pretrained` are told."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import moekernels as mk
from moekernels.checkpoint import CheckpointError
from tests.models.tiny import CONFIGS, base_class, head_class, inputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


def logits(model: Any, name: str = "olmoe") -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(name)).logits
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    head_class("olmoe")(CONFIGS["olmoe"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_directory", [False, True])
def test_state_dict(name: str, with_directory: bool, tmp_path: Path) -> None:
    """Weights as transformers has them in memory, instead of files."""
    theirs = head_class_of_transformers(name)
    config = CONFIGS[name]
    if with_directory:
        config.save_pretrained(tmp_path)
        model = head_class(name).from_pretrained(tmp_path, state_dict=theirs.state_dict())
    else:
        model = head_class(name).from_pretrained(None, config=config, state_dict=theirs.state_dict())
    expected = theirs(**inputs(name)).logits
    torch.testing.assert_close(logits(model, name), expected, atol=1e-5, rtol=1e-4)
    assert all(not p.is_meta for p in model.parameters()) and not model.training


def head_class_of_transformers(name: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIGS[name].to_dict())
    return getattr(transformers, head_class(name).__name__)(config).eval()


def test_incomplete_state_dict(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"state_dict: does not fit .*missing tensor 'model.norm.weight'"):
        mk.OlmoeForCausalLM.from_pretrained(saved, state_dict=weights)
    with pytest.raises(ValueError, match="without a checkpoint there must be a config"):
        mk.OlmoeForCausalLM.from_pretrained(None, state_dict=weights)
    with pytest.raises(ValueError, match="neither a checkpoint nor a state_dict is given"):
        mk.OlmoeForCausalLM.from_pretrained(None, config=CONFIGS["olmoe"])


def test_loading_info(saved: Path) -> None:
    model, info = mk.OlmoeForCausalLM.from_pretrained(saved, output_loading_info=True)
    _, theirs = transformers.OlmoeForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, mk.OlmoeForCausalLM)
    assert info.keys() == theirs.keys() and not any(info.values())
    _, info = mk.OlmoeModel.from_pretrained(saved, output_loading_info=True)
    _, theirs = transformers.OlmoeModel.from_pretrained(saved, output_loading_info=True)
    assert info["unexpected_keys"] == list(theirs["unexpected_keys"]) == ["lm_head.weight"]
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_mismatched_sizes(saved: Path) -> None:
    other: dict[str, Any] = {"vocab_size": 70, "intermediate_size": 20}
    with pytest.raises(CheckpointError, match=r"vocab_size .* must be 61, .* got 70 \(ignore_mismatched_sizes=True"):
        mk.OlmoeForCausalLM.from_pretrained(saved, **other)
    with pytest.warns(UserWarning, match=r"does not fit .*lm_head.weight \[70, 16\] \(it has \[61, 16\]\)"):
        model, info = mk.OlmoeForCausalLM.from_pretrained(
            saved, **other, ignore_mismatched_sizes=True, output_loading_info=True
        )
    experts = [f"model.layers.{i}.mlp.experts.{kind}" for i in range(3) for kind in ("gate_up_proj", "down_proj")]
    assert {name for name, *_ in info["mismatched_keys"]} == {"model.embed_tokens.weight", "lm_head.weight", *experts}
    assert len(info["mismatched_keys"]) == 8
    assert ("lm_head.weight", (61, 16), (70, 16)) in info["mismatched_keys"]
    # New weights where they did not fit, the checkpoint's everywhere else.
    whole = mk.OlmoeForCausalLM.from_pretrained(saved)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, whole.model.layers[1].self_attn.q_proj.weight)
    for name in ("model.embed_tokens.weight", "lm_head.weight", *experts):
        weight = model.get_parameter(name)
        assert 0.01 < weight.std() < 0.03 and weight.isfinite().all(), name
    assert logits(model).shape[-1] == 70 and logits(model).isfinite().all()


@pytest.fixture
def _garbage_in_new_memory() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("olmoe", {"num_key_value_heads": 1, "intermediate_size": 20, "num_experts": 6}),
        ("phimoe", {"num_key_value_heads": 2, "intermediate_size": 20}),
        ("m2m_100", {"encoder_ffn_dim": 20, "vocab_size": 70}),
        ("nllb-moe", {"decoder_ffn_dim": 20, "encoder_ffn_dim": 20}),
        ("switch_transformers", {"relative_attention_num_buckets": 16}),
        ("switch_transformers", {"d_kv": 4, "d_ff": 20, "num_experts": 6, "relative_attention_num_buckets": 16}),
    ],
)
def test_new_weights_are_those_of_a_new_model(
    name: str, other: dict[str, Any], tmp_path: Path, _garbage_in_new_memory: None
) -> None:
    """Whichever module initialises them; and the rest is the checkpoint's."""
    whole = head_class(name)(CONFIGS[name])
    whole.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not fit"):
        model, info = head_class(name).from_pretrained(
            tmp_path, **other, ignore_mismatched_sizes=True, output_loading_info=True
        )
    torch.manual_seed(1)
    fresh = dict(head_class(name)(model.config).named_parameters())
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    assert len(mismatched) >= 2
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not parameter.is_meta, key
        if key not in mismatched:
            assert torch.equal(parameter, whole.get_parameter(key)), key
        elif fresh[key].numel() > 1:
            found, expected = parameter.std().item(), fresh[key].std().item()
            assert found == expected == 0 or 0.5 < found / expected < 2, key


def test_another_number_of_labels(tmp_path: Path) -> None:
    mk.PhimoeForSequenceClassification(CONFIGS["phimoe"]).save_pretrained(tmp_path)
    load = mk.AutoModelForSequenceClassification.from_pretrained
    assert load(tmp_path).config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(CheckpointError, match=r"'score.weight' must have shape \[3, 16\], got \[2, 16\] \(ignore_mism"):
        load(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match=r"does not fit score.weight \[3, 16\]"):
        model = load(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert logits(model, "phimoe").shape == (2, 3) and model.config.num_labels == 3
    labels = {0: "no", 1: "yes"}
    assert load(tmp_path, id2label=labels, label2id={"no": 0, "yes": 1}).config.id2label == labels


def test_one_wrong_expert_replaces_the_stack(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.mlp.experts.2.up_proj.weight"] = torch.zeros(3, 16)
    save_file(weights, saved / "model.safetensors")
    with pytest.warns(UserWarning, match=r"layers.0.mlp.experts.gate_up_proj"):
        model = mk.OlmoeForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    assert 0.01 < stack.std() < 0.03
    assert not torch.equal(stack[0, :24], weights["model.layers.0.mlp.experts.0.gate_proj.weight"])


def test_variant(saved: Path) -> None:
    expected = logits(mk.OlmoeForCausalLM.from_pretrained(saved))
    (saved / "model.safetensors").rename(saved / "model.fp16.safetensors")
    assert torch.equal(logits(mk.OlmoeForCausalLM.from_pretrained(saved, variant="fp16")), expected)
    with pytest.raises(CheckpointError, match=r"expected one of model.safetensors, model.safetensors.index.json"):
        mk.OlmoeForCausalLM.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"expected one of model.bf16.safetensors, model.safetensors.index.bf16"):
        mk.OlmoeForCausalLM.from_pretrained(saved, variant="bf16")


def test_sharded_variant(tmp_path: Path) -> None:
    theirs = transformers.OlmoeForCausalLM(transformers.AutoConfig.for_model(**CONFIGS["olmoe"].to_dict())).eval()
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size="5KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    model = mk.OlmoeForCausalLM.from_pretrained(tmp_path, variant="fp16")
    torch.testing.assert_close(logits(model), theirs(**inputs("olmoe")).logits, atol=1e-5, rtol=1e-4)


def test_generation_config_argument(saved: Path) -> None:
    given = mk.GenerationConfig(max_new_tokens=3)
    assert mk.OlmoeForCausalLM.from_pretrained(saved, generation_config=given).generation_config is given


def test_arguments_of_transformers(saved: Path) -> None:
    """Those that change nothing here are taken; an unknown one is an error."""
    taken: dict[str, Any] = {
        "low_cpu_mem_usage": True, "trust_remote_code": True, "revision": "main", "token": "t", "cache_dir": "/nowhere",
        "local_files_only": True, "force_download": False, "weights_only": True, "_fast_init": True,
        "code_revision": "main", "offload_state_dict": False, "subfolder": "", "adapter_kwargs": None,
    }  # fmt: skip
    assert mk.OlmoeForCausalLM.from_pretrained(saved, **taken).config.to_dict() == CONFIGS["olmoe"].to_dict()
    with pytest.raises(ValueError, match="neither arguments nor fields of the configuration: quantisation"):
        mk.OlmoeForCausalLM.from_pretrained(saved, quantisation=True)


# Saving.


def test_save_parameters_are_those_of_transformers() -> None:
    theirs = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    ours = inspect.signature(mk.PreTrainedModel.save_pretrained).parameters
    assert set(theirs) - set(ours) == {
        "save_directory", "save_function", "push_to_hub", "variant", "token", "save_peft_format", "kwargs",
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_save_a_gathered_state_dict(name: str, tmp_path: Path) -> None:
    model = head_class(name)(CONFIGS[name]).eval()
    gathered = {key: value.clone() + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    again = head_class(name).from_pretrained(tmp_path)
    for key, value in again.named_parameters():
        assert torch.equal(value, gathered[key]), key
    first = next(iter(dict(model.named_parameters())))
    del gathered[first]
    with pytest.raises(ValueError, match=f"save_pretrained: state_dict lacks {first}"):
        model.save_pretrained(tmp_path / "other", state_dict=gathered)
    assert not (tmp_path / "other").exists()


def test_only_the_main_process_saves(tmp_path: Path) -> None:
    head_class("olmoe")(CONFIGS["olmoe"]).save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        head_class("olmoe")(CONFIGS["olmoe"]).save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_saving_a_configuration_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("kept")
    CONFIGS["olmoe"].save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "other.txt"]
    CONFIGS["olmoe"].to_json_file(tmp_path / "whole.json", use_diff=False)
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads(json.dumps(CONFIGS["olmoe"].to_dict()))
    assert mk.OlmoeConfig.from_json_file(tmp_path / "whole.json") == CONFIGS["olmoe"]


def test_a_model_without_its_head_from_a_whole_one(saved: Path) -> None:
    whole = mk.OlmoeForCausalLM.from_pretrained(saved)
    base = base_class("olmoe").from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(base(**inputs("olmoe"))[0], whole.model(**inputs("olmoe"))[0])


@pytest.mark.parametrize("quantization", [None, {"format": "int8"}])
def test_loading_imports_no_compiler(saved: Path, quantization: dict[str, str] | None) -> None:
    """As drawing weights on the meta device would, in vain: a second, and 80 MB for as long as the process lives."""
    code = """
import json, sys
import torch, moekernels
before = set(sys.modules)
model = moekernels.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=json.loads(sys.argv[2]))
model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3)
print(sorted(name for name in set(sys.modules) - before if name in ("sympy", "torch._dynamo", "torch._inductor")))
"""
    command = [sys.executable, "-c", code, str(saved), json.dumps(quantization)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
