"""Checkpoints in the formats of bitsandbytes: read, made while loading, and written, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moekernels as mk
from moekernels.checkpoint import KEY_MAPS, CheckpointError
from moekernels.models.auto import ARCHITECTURES
from moekernels.quantization import Int8, QuantizedWeight
from tests.models import quantized_checkpoints as saved

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


class Made:
    """A whole checkpoint, a quantised one of it, and transformers' quantised model."""

    def __init__(self, root: Path, kind: str, format: str) -> None:
        self.kind = kind
        self.whole = root / "whole"
        saved.write(self.whole, kind)
        self.directory = root / "quantized"
        self.theirs = saved.write_quantized(self.directory, self.whole, kind, **FORMATS[format])
        self.config = mk.BitsAndBytesConfig(**FORMATS[format])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    once: dict[tuple[str, str], Made] = {}

    def make(kind: str, format: str) -> Made:
        if (kind, format) not in once:
            once[kind, format] = Made(tmp_path_factory.mktemp("made"), kind, format)
        return once[kind, format]

    return make


def ours(kind: str, directory: Path, **kwargs: Any) -> Any:
    found = ARCHITECTURES[kind]
    return (found.causal_lm or found.seq2seq_lm).from_pretrained(directory, **kwargs)  # type: ignore[union-attr]


def matrices(model: Any, kind: str) -> dict[str, tuple[torch.Tensor, bool]]:
    """Every weight by transformers' name of its module: its values, and whether it is quantised."""
    key_map = KEY_MAPS[kind]
    found = {}
    for name, parameter in model.named_parameters():
        canonical = key_map.canonical(name)
        whole = parameter.dequantize() if isinstance(parameter, QuantizedWeight) else parameter.detach()
        for key, place in key_map.checkpoint_names(canonical, tuple(parameter.shape)):
            module = (name.removesuffix(canonical) + key).removesuffix(".weight")
            found[module] = (place.view(whole).float(), isinstance(parameter, QuantizedWeight))
    return found


ALL = [
    *(("olmoe", format) for format in FORMATS),
    ("phimoe", "nf4"),
    ("m2m_100", "int8"),
    ("nllb-moe", "nf4"),
    ("switch_transformers", "int8"),
]


@pytest.mark.parametrize(("kind", "format"), ALL)
def test_reading(made: Callable[[str, str], Made], kind: str, format: str) -> None:
    """Values bit for bit, and the logits of a whole model with those values."""
    it = made(kind, format)
    model = ours(kind, it.directory)
    found = matrices(model, kind)
    count = 0
    for name, layer in it.theirs.named_modules():
        if "bitsandbytes" in type(layer).__module__ and isinstance(layer, nn.Linear):
            value, is_quantized = found[name]
            assert torch.equal(value, saved.values(layer)), name
            # Routers are held whole, with the values that the file has.
            assert is_quantized == (name.rpartition(".")[2] not in ("gate", "classifier")), name
            count += 1
    assert count > 8
    expected = saved.with_values(it.theirs, it.whole, kind)
    with torch.no_grad():
        logits, theirs = (each(**saved.inputs(kind)).logits for each in (model, expected))
    torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "format"), ALL)
def test_quantising_while_loading(made: Callable[[str, str], Made], kind: str, format: str) -> None:
    """The codes are bitsandbytes'; head, embeddings, routers and norms are whole."""
    it = made(kind, format)
    found = matrices(ours(kind, it.whole, quantization_config=it.config), kind)
    whole = matrices(ours(kind, it.whole), kind)
    for name, layer in it.theirs.named_modules():
        if "bitsandbytes" not in type(layer).__module__ or not isinstance(layer, nn.Linear):
            continue
        value, is_quantized = found[name]
        if name.rpartition(".")[2] in ("gate", "classifier"):
            assert not is_quantized and torch.equal(value, whole[name][0])
        elif format != "nf4-double":
            assert is_quantized and torch.equal(value, saved.values(layer)), name
    quantized = {name for name, (_, is_quantized) in found.items() if is_quantized}
    assert all(
        "experts" in name or "proj" in name or "fc" in name or ".mlp." in name or "ttention" in name
        for name in quantized
    )
    assert not any(name in quantized for name in ("lm_head", "shared", "model.embed_tokens"))


@pytest.mark.parametrize(("kind", "format"), ALL)
def test_writing(made: Callable[[str, str], Made], kind: str, format: str, tmp_path: Path) -> None:
    """transformers reads what is written, with the same values; and so do we."""
    it = made(kind, format)
    model = ours(kind, it.whole, quantization_config=it.config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    found = matrices(model, kind)
    theirs = saved.load_theirs(tmp_path / "saved", kind, dtype=torch.float32)
    layers = {
        n: m for n, m in theirs.named_modules() if "bitsandbytes" in type(m).__module__ and isinstance(m, nn.Linear)
    }
    assert {name for name, (_, is_quantized) in found.items() if is_quantized} == set(layers)
    for name, layer in layers.items():
        assert torch.equal(found[name][0], saved.values(layer)), name
    # Rows that are no multiple of blocks bitsandbytes does not run on CPUs with AVX-512.
    reference = theirs if format == "int8" else saved.with_values(theirs, it.whole, kind)
    with torch.no_grad():
        logits, expected = (each(**saved.inputs(kind)).logits.float() for each in (model, reference))
    # In 8 bits bitsandbytes rounds activations to 8 bits too.
    atol = (0.15 if format == "int8" else 1e-3) * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)

    again = ours(kind, tmp_path / "saved")
    assert {name: q for name, (_, q) in matrices(again, kind).items()} == {name: q for name, (_, q) in found.items()}
    for name, (value, _) in matrices(again, kind).items():
        assert torch.equal(value, found[name][0]), name


def test_scales_of_an_evaluation_pass(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """bitsandbytes on a CPU with AVX512-BF16 leaves scales transposed and rounded; we put them right, and warn."""
    it = made("olmoe", "nf4")
    shutil.copytree(it.directory, tmp_path / "spoilt")
    tensors = load_file(it.directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    rounded = tensors[f"{name}.absmax"].view(64, 1).bfloat16()
    tensors[f"{name}.absmax"] = rounded.t().contiguous()
    save_file(tensors, tmp_path / "spoilt" / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"q_proj.weight.*saved after an evaluation pass of bitsandbytes"):
        spoilt = ours("olmoe", tmp_path / "spoilt")
    weight = spoilt.get_parameter(name)
    good = ours("olmoe", it.directory).get_parameter(name)
    assert torch.equal(weight.parts["absmax"], rounded.float().flatten())
    assert torch.equal(weight.parts["codes"], good.parts["codes"])


def test_parts_in_several_shards(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    it = made("olmoe", "nf4")
    tensors = load_file(it.directory / "model.safetensors")
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[i % 2][name] = tensor
    weight_map = {}
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(it.directory / "config.json", tmp_path)
    found, expected = (matrices(ours("olmoe", directory), "olmoe") for directory in (tmp_path, it.directory))
    assert all(torch.equal(found[name][0], value) for name, (value, _) in expected.items())


def _changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


Q = "model.layers.1.self_attn.q_proj.weight"


def _drop(name: str) -> Callable[..., None]:
    return lambda tensors, config: tensors.pop(name)


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda tensors, config: tensors.update({name: make(tensors[name]).contiguous()})


def _config(**fields: Any) -> Callable[..., None]:
    return lambda tensors, config: config["quantization_config"].update(fields)


# ruff: noqa: E501 - a case a line
BROKEN = [
    ("nf4", _drop(f"{Q}.absmax"), rf"'{Q}' is quantised, but '{Q}.absmax' is missing"),
    ("nf4", _set(Q, lambda t: t[:-1]), rf"'{Q}': codes of a nf4 weight \[64, 64\] must be torch.uint8 \[2048\], got .*2047"),
    ("nf4", _set(f"{Q}.absmax", lambda t: t[:-2]), rf"'{Q}': absmax of a nf4 weight \[64, 64\] must be .*\[64\], got .*\[62\]"),
    ("nf4", _set(f"{Q}.quant_map", lambda t: t + 1), rf"'{Q}': its quant_map is not that of nf4"),
    ("nf4", _set(f"{Q}.quant_state.bitsandbytes__nf4", lambda t: t[:-9]), "must be bytes of a JSON object"),
    ("nf4", _config(bnb_4bit_quant_type="fp4"), "is stored as nf4, but quantization_config has bnb_4bit_quant_type='fp4'"),
    ("nf4", _config(load_in_4bit=False, load_in_8bit=True), "is of a weight in 4 bits, but quantization_config says load_in_8bit"),
    ("nf4", _config(load_in_8bit=True), "must have one of load_in_4bit and load_in_8bit"),
    ("int8", _drop(Q.replace("weight", "SCB")), rf"'{Q}' is quantised, but .*SCB' is missing"),
    ("int8", _set(Q.replace("weight", "SCB"), lambda t: t[1:]), rf"'{Q}': SCB of a int8 weight \[64, 64\] must be .*got .*\[63\]"),
    ("int8", _set(f"{Q}_format", lambda t: t + 2), "must be 0"),
    ("int8", _set(Q, lambda t: t[:, :32]), r"q_proj.weight' must have shape \[64, 64\], got \[64, 32\]"),
    ("int8", _config(quant_method="gptq"), "its weights are quantised by gptq, which is not supported"),
    ("int8", _config(quant_method="fp8"), "its weights are quantised by fp8, which is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "change", "message"), BROKEN)
def test_contradictions(
    made: Callable[[str, str], Made], format: str, change: Any, message: str, tmp_path: Path
) -> None:
    broken = _changed(made("olmoe", format).directory, tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        ours("olmoe", broken)
    assert str(broken) in str(caught.value)


def test_a_configuration_without_quantised_weights(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    broken = _changed(made("olmoe", "nf4").whole, tmp_path / "x", lambda tensors, config: config.update(quantization))
    with pytest.raises(CheckpointError, match="says load_in_4bit, but no weight is quantised"):
        ours("olmoe", broken)
    broken = _changed(
        made("olmoe", "nf4").directory, tmp_path / "y", lambda tensors, config: config.pop("quantization_config")
    )
    with pytest.raises(CheckpointError, match=r"holds quantised weights .*quantization_config"):
        ours("olmoe", broken)


def test_storage_dtype(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    it = made("olmoe", "nf4")
    config = mk.BitsAndBytesConfig(**FORMATS["nf4"], bnb_4bit_quant_storage="bfloat16")
    model = ours("olmoe", it.whole, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")[Q].dtype == torch.bfloat16
    # Without a dtype transformers casts the codes, as if they were weights.
    layer = saved.load_theirs(tmp_path, "olmoe", dtype=torch.bfloat16).get_submodule(Q.removesuffix(".weight"))
    value = matrices(model, "olmoe")[Q.removesuffix(".weight")][0]
    assert torch.equal(saved.values(layer), value)
    assert torch.equal(matrices(ours("olmoe", tmp_path), "olmoe")[Q.removesuffix(".weight")][0], value)


@pytest.mark.parametrize(
    ("skip", "whole"),
    [
        ([], []),
        (["lm_head", "o_proj"], ["lm_head", "o_proj"]),
        (["lm_head", "model.layers.0"], ["lm_head", "layers.0."]),
        (["experts"], ["experts"]),
        (["gate_proj"], ["gate_proj", "up_proj"]),  # one stack
    ],
)
def test_skipped_modules(made: Callable[[str, str], Made], skip: list[str], whole: list[str]) -> None:
    config = mk.BitsAndBytesConfig(**FORMATS["int8"], llm_int8_skip_modules=skip)
    found = matrices(ours("olmoe", made("olmoe", "int8").whole, quantization_config=config), "olmoe")
    kept = ("embed", "norm", ".gate", *whole)
    for name, (_, is_quantized) in found.items():
        stays = any(part in f"{name}." for part in kept) and not (
            name.endswith("gate_proj") and "gate_proj" not in whole and not any(p in f"{name}." for p in whole)
        )
        assert is_quantized != stays, name


def test_rounded_activations(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """`llm_int8_threshold` says which stay as they are. Files keep it, transformers passes over what it does not know."""
    it = made("olmoe", "int8")

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**saved.inputs("olmoe")).logits

    def rounding(threshold: float) -> Any:
        config = mk.BitsAndBytesConfig(load_in_8bit=True, activations="int8", llm_int8_threshold=threshold)
        return ours("olmoe", it.whole, quantization_config=config)

    exact = logits(ours("olmoe", it.whole, quantization_config=it.config))
    errors = [(logits(rounding(threshold)) - exact).norm() / exact.norm() for threshold in (0.0, 2.0, 1e-6)]
    assert errors[0] > 1.1 * errors[1] > 100 * errors[2]
    with_other = mk.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0)  # nothing is rounded without it
    assert torch.equal(logits(ours("olmoe", it.whole, quantization_config=with_other)), exact)

    model = rounding(2.0)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (written["activations"], written["llm_int8_threshold"]) == ("int8", 2.0)
    again = ours("olmoe", tmp_path / "saved")
    assert again.model.layers[0].mlp.experts.down_proj.format == Int8(activations="int8", threshold=2.0)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == written
    layer = saved.load_theirs(tmp_path / "saved", "olmoe", dtype=torch.float32).get_submodule(Q.removesuffix(".weight"))
    assert layer.state.threshold == 2.0
    theirs = it.directory / "config.json"
    assert "activations" not in json.loads(theirs.read_text())["quantization_config"]
    written["activations"] = "int4"
    config = json.loads((tmp_path / "saved" / "config.json").read_text()) | {"quantization_config": written}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="quantization_config: int8: activations must be 'int8' or None, got 'int4'"
    ):
        ours("olmoe", tmp_path / "saved")
