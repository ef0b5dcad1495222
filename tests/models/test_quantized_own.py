"""Formats that no other library reads: while loading, saved, loaded again, and by `moekernels quantize`."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moekernels as mk
from moekernels import ops
from moekernels.checkpoint import CheckpointError, CheckpointReader
from moekernels.checkpoint.quantized import QuantizedReader
from moekernels.cli import main
from moekernels.models import converting
from moekernels.models.converting import quantize_checkpoint
from moekernels.models.quantized import quantize_model
from moekernels.quantization import QuantizedWeight
from tests.models import tiny


def _write(directory: Path, kind: str) -> Path:
    """A checkpoint of ours, wide enough for groups of 64."""
    config = tiny.CONFIGS[kind]
    widths = {"hidden_size": 64, "intermediate_size": 64, "d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 128}
    widths |= {"d_ff": 64, "d_kv": 32}
    fields = {name: widths.get(name, value) for name, value in config.to_dict().items()}
    torch.manual_seed(2)
    model = tiny.head_class(kind)(type(config)(**fields))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = _write(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


def _load(kind: str, directory: Path, **kwargs: Any) -> Any:
    return tiny.head_class(kind).from_pretrained(directory, **kwargs)


def _equal(first: Any, second: Any) -> None:
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert type(parameter) is type(theirs[name]) and torch.equal(parameter, theirs[name]), name


CASES = [
    ("olmoe", {"format": "int4", "group_size": 32}),
    ("phimoe", {"format": "int4", "group_size": 64}),
    ("m2m_100", {"format": "q8_0"}),
    ("nllb-moe", {"format": "int4"}),
    ("switch_transformers", {"format": "q4_0"}),
]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_while_loading_and_saved(whole: Any, kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """What is loaded is what :func:`ops.quantize` makes of the weights, and what is saved loads as it is."""
    plain, model = _load(kind, whole(kind)), _load(kind, whole(kind), quantization_config=config)
    options = {name: value for name, value in config.items() if name != "format"}
    packed = 0
    for name, parameter in model.named_parameters():
        weight = plain.get_parameter(name)
        if isinstance(parameter, QuantizedWeight):
            assert torch.equal(parameter, ops.quantize(weight, config["format"], **options)), name
            assert not parameter.requires_grad
            packed += 1
        else:
            assert torch.equal(parameter, weight), name
            is_kept = parameter.ndim == 1 or any(
                part in name for part in ("embed", "shared", "lm_head", "router", "relative")
            )
            assert is_kept or "bias" in name, name
    assert packed >= 8
    # The products are those of the weights that were made.
    for name, parameter in plain.named_parameters():
        found = model.get_parameter(name)
        if isinstance(found, QuantizedWeight):
            parameter.data = found.dequantize()
    inputs = tiny.inputs(kind)
    with torch.no_grad():
        logits, expected = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert model.get_memory_footprint() < 0.7 * plain.get_memory_footprint()

    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    again = _load(kind, tmp_path / "saved")
    _equal(model, again)
    entry = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "moekernels" and {**entry, **config} == entry

    converted = _load(kind, whole(kind))
    quantize_model(converted, mk.QuantizationConfig(config["format"], options).quantization())
    _equal(model, converted)
    quantize_checkpoint(whole(kind), tmp_path / "converted", mk.QuantizationConfig(config["format"], options))
    _equal(model, _load(kind, tmp_path / "converted"))


def test_only_modules_that_could_be_quantised_are_named(whole: Any, tmp_path: Path) -> None:
    """Biases of experts are a matrix here, and vectors of many modules in a file."""
    _load("nllb-moe", whole("nllb-moe"), quantization_config={"format": "int4"}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["skip_modules"] == ["lm_head", "classifier"]


@pytest.mark.parametrize("format", ["int4", "q8_0", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["m2m_100", "switch_transformers"])
def test_a_tied_head(whole: Any, kind: str, format: str, tmp_path: Path) -> None:
    """Head and embedding are one weight, quantised where nothing is to be skipped."""
    config = {"format": format, "skip_modules": []}
    model = _load(kind, whole(kind), quantization_config=config).eval()
    shared = model.get_input_embeddings().weight
    assert isinstance(shared, QuantizedWeight) and model.lm_head.weight is shared
    assert model.get_encoder().embed_tokens.weight is shared and model.get_decoder().embed_tokens.weight is shared
    ids = torch.randint(3, 20, (2, 5))
    logits = model(input_ids=ids, decoder_input_ids=ids).logits

    in_memory = _load(kind, whole(kind)).eval()
    quantize_model(in_memory, mk.QuantizationConfig(format, skip_modules=[]).quantization())
    assert in_memory.lm_head.weight is in_memory.get_input_embeddings().weight
    assert torch.equal(in_memory(input_ids=ids, decoder_input_ids=ids).logits, logits)

    values = _load(kind, whole(kind)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = parameter.dequantize() if isinstance(parameter, QuantizedWeight) else parameter
            values.get_parameter(name).copy_(value)
    torch.testing.assert_close(values(input_ids=ids, decoder_input_ids=ids).logits, logits)

    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(whole(kind), tmp_path / "written", mk.QuantizationConfig(format, skip_modules=[]))
    for directory in (tmp_path / "saved", tmp_path / "written"):
        again = _load(kind, directory).eval()
        _equal(model, again)
        assert again.lm_head.weight is again.get_input_embeddings().weight
    with pytest.raises(ValueError, match=f"the weight of .*Embedding is quantised \\({format}\\) and cannot get rows"):
        model.resize_token_embeddings(200)


@pytest.mark.parametrize("to", ["int8", "nf4", "int4"])
def test_a_tied_head_by_the_command(whole: Any, to: str, tmp_path: Path) -> None:
    source, target = str(whole("m2m_100")), str(tmp_path / "few")
    assert main(["quantize", "--model", source, "--to", to, "--output", target, "--skip-modules"]) == 0
    model = _load("m2m_100", tmp_path / "few")
    assert isinstance(model.lm_head.weight, QuantizedWeight) and model.lm_head.weight.format.name == to
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["m2m_100", "olmoe"])
def test_compiled(whole: Any, kind: str) -> None:
    model = _load(kind, whole(kind), quantization_config={"format": "int4", "skip_modules": []}).eval()
    ids = {"input_ids": torch.randint(3, 20, (2, 5))}
    if kind == "m2m_100":
        ids["decoder_input_ids"] = ids["input_ids"]
    for stack in [model.get_encoder(), model.get_decoder()] if kind == "m2m_100" else [model.model]:
        del stack.layers[1:]  # tracing takes long, and the others are like the first
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(**ids).logits
        torch.testing.assert_close(compiled, model(**ids).logits)


@pytest.mark.parametrize(
    "config",
    [
        {"format": "int4"},
        {"format": "int4", "skip_modules": ["lm_head"]},
        {"format": "int4", "skip_modules": ["shared"]},
        {"format": "int4", "skip_modules": [], "compute_dtype": "bfloat16"},
        {"format": "nf4", "skip_modules": [], "double_quant": True},
        {"load_in_8bit": True, "llm_int8_skip_modules": []},
    ],
)
def test_a_tied_head_that_stays_whole(whole: Any, config: dict[str, Any]) -> None:
    model = _load("m2m_100", whole("m2m_100"), quantization_config=config)
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert isinstance(model.get_decoder().layers[0].fc1.weight, QuantizedWeight)


def test_a_state_dict(whole: Any) -> None:
    model = _load("olmoe", whole("olmoe"), quantization_config={"format": "int4"})
    again = mk.OlmoeForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    _equal(model, again)


def test_double_quantisation_whose_blocks_do_not_fit(whole: Any, tmp_path: Path) -> None:
    """Of two projections in one stack it is left out, and said nowhere but in the files."""
    config = mk.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = _load("olmoe", whole("olmoe"), quantization_config=config)
    experts = model.model.layers[0].mlp.experts
    assert not experts.gate_up_proj.format.double_quant and experts.down_proj.format.double_quant
    model.save_pretrained(tmp_path)
    _equal(model, _load("olmoe", tmp_path))


def test_parts_that_do_not_fit(whole: Any, tmp_path: Path) -> None:
    model = _load("olmoe", whole("olmoe"), quantization_config={"format": "int4"})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"

    def check(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file({**tensors, **changed}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            _load("olmoe", tmp_path)

    check(
        {f"{name}.scales": tensors[f"{name}.scales"][:, :-1].contiguous()}, f"'{name}': scales of a int4 weight .* got"
    )
    check(
        {f"{name}.shape": torch.tensor([4, 64, 33])}, f"'{name}': the last dimension of weight must be a multiple of 32"
    )
    check({f"{name}.shape": torch.tensor([4, -1, 32])}, "must be 2 or 3 positive numbers")
    check({f"{name}.shape": torch.tensor([4, 32, 128])}, r"must have shape \[4, 64, 64\], got \[4, 32, 128\]")
    del tensors[f"{name}.scales"]
    check({}, f"'{name}.shape'|'{name}.scales' is missing")


def test_what_is_asked_for(whole: Any) -> None:
    for config, message in (
        ({"format": "int3"}, "format must be one of .*int4.*; got 'int3'"),
        ({"format": "int4", "group_size": 48}, "group_size must be 32 or 64, got 48"),
        ({"format": "int4", "blocksize": 64}, "int4 has the options group_size, activations; got 'blocksize'"),
        ({"format": "q6_k"}, "the last dimension of weight must be a multiple of 256"),
        ({"load_in_4bit": True, "group_size": 3}, "no field of BitsAndBytesConfig: group_size"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method must be bitsandbytes or moekernels, got 'gptq'"),
        ("int4", "quantization_config must be a BitsAndBytesConfig, a QuantizationConfig or a dictionary, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            _load("olmoe", whole("olmoe"), quantization_config=config)


def test_asked_for_twice(whole: Any, tmp_path: Path) -> None:
    model = _load("olmoe", whole("olmoe"), quantization_config={"format": "int4"})
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its weights are quantised already; they stay as they are"):
        again = _load("olmoe", tmp_path, load_in_8bit=True)
    _equal(model, again)


def _mapped(path: Path) -> int:
    """Bytes of a file that count as this process's memory."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()[0]
        if not field.endswith(":"):
            inside = line.endswith(str(path.resolve()))
        elif inside and field == "Rss:":
            resident += int(line.split()[1]) * 1024
    return resident


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mapped memory")
@pytest.mark.parametrize("config", [{"format": "int4"}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_what_has_been_read_is_given_back(config: dict[str, Any], tmp_path: Path) -> None:
    """A weight waits for its last part; its others are not to stay mapped meanwhile, nor come back."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_experts": 16, "num_hidden_layers": 4}
    model = mk.OlmoeForCausalLM(mk.OlmoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, vocab_size=64))
    model.save_pretrained(tmp_path / "whole")
    _load("olmoe", tmp_path / "whole", quantization_config=config).save_pretrained(tmp_path / "few")
    (path,) = (tmp_path / "few").glob("*.safetensors")
    settings = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]
    most = 0
    for shard in QuantizedReader(CheckpointReader(tmp_path / "few"), settings).shards():
        for i, (_, tensor) in enumerate(shard):
            parts = tensor.parts.values() if isinstance(tensor, QuantizedWeight) else [tensor]
            sum(float(part.float().sum()) for part in parts)
            if i % 16 == 0:  # looking takes longer than reading
                most = max(most, _mapped(path))
    assert 0 < most < path.stat().st_size / 3


def test_command(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "small"
    (tmp_path / "tokenizer").mkdir()
    source = whole("olmoe")
    (source / "tokenizer_config.json").write_text("{}")
    assert (
        main(["quantize", "--model", str(source), "--to", "int4", "--group-size", "64", "--output", str(target)]) == 0
    )
    assert "small: 0.00 GB in int4" in capsys.readouterr().err
    assert (target / "tokenizer_config.json").read_text() == "{}" and (target / "generation_config.json").is_file()
    _equal(_load("olmoe", target), _load("olmoe", source, quantization_config={"format": "int4", "group_size": 64}))
    assert (
        main(["quantize", "--model", str(source), "--to", "nf4", "--skip-modules", "experts", "--output", str(target)])
        == 0
    )
    with safe_open(target / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight.absmax" in names and "model.layers.0.mlp.experts.0.up_proj.weight" in names
    assert not any("experts" in name and "absmax" in name for name in names)
    for arguments, message in (
        (["--to", "nf4", "--group-size", "32"], "--group-size is for int4, got --to nf4"),
        (["--to", "int4", "--double-quant"], "--double-quant is for nf4 and fp4, got --to int4"),
    ):
        assert main(["quantize", "--model", str(source), "--output", str(tmp_path / "x"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["quantize", "--model", str(target), "--to", "int4", "--output", str(tmp_path / "x")]) == 2
    assert "its weights are quantised already" in capsys.readouterr().err
    assert main(["quantize", "--model", str(source), "--to", "int4", "--output", str(source)]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err


def test_a_full_disk(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage(1, 1, 2**26))
    with pytest.raises(OSError, match=r"need 0.00 GB, and 0.07 GB are free"):
        quantize_checkpoint(whole("olmoe"), tmp_path / "out", mk.QuantizationConfig("int4"))
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_an_error_leaves_what_was_there(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.txt").write_text("kept")
    monkeypatch.setattr(converting.SpilledWriter, "finish", lambda self: (_ for _ in ()).throw(OSError("no more")))
    with pytest.raises(OSError, match="no more"):
        quantize_checkpoint(whole("olmoe"), tmp_path, mk.QuantizationConfig("int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_training_is_refused() -> None:
    model = mk.OlmoeForCausalLM.from_config(tiny.CONFIGS["olmoe"])
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(ops.quantize(layer.weight.detach(), "int8"), requires_grad=False)
    with pytest.raises(ValueError, match="a quantised weight cannot be trained"):
        model.requires_grad_(True)


def test_adapters_learn(whole: Any) -> None:
    """LoRA beside quantised Linears: only the adapters change, and their gradients are those beside whole weights."""
    gradients = []
    for is_quantized in (True, False):
        model = _load("olmoe", whole("olmoe"), quantization_config={"format": "int4"})
        if not is_quantized:
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if isinstance(parameter, QuantizedWeight):
                        module._parameters[name] = torch.nn.Parameter(parameter.dequantize())
        torch.manual_seed(0)
        tuned: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=4))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        ids = tiny.inputs("olmoe")["input_ids"]
        tuned(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 12 and all("lora" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)
