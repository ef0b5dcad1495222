"""Models from GGUF files, whose weights stay packed, against gguf-py's values."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

import moekernels as mk
from moekernels.checkpoint import CheckpointError
from moekernels.quantization import QuantizedWeight
from tests.checkpoint import gguf_files

#: As a "Q4_K_M" file has them, nearly.
MIXED = {
    **{"attn_v": "Q6_K", "down_exps": "Q6_K", "attn_output": "BF16", "gate_inp": "F32"},
    **{"attn": "Q4_K", "exps": "Q4_K", "output": "Q6_K", "token_embd": "Q4_K"},
}
CLASSES: dict[str, Any] = {"olmoe": mk.OlmoeForCausalLM, "phimoe": mk.PhimoeForCausalLM}
FILES = [
    ("olmoe", {"attn": "Q4_0", "exps": "Q4_0", "output": "Q8_0", "token_embd": "F16"}),
    ("olmoe", MIXED),
    ("phimoe", {"attn": "Q8_0", "exps": "Q8_0", "output": "F16", "token_embd": "BF16"}),
]


# The same bits, codes and scales apart.
READ_AS = {"Q4_0": "int4", "Q8_0": "int8_groups"}


@pytest.mark.parametrize(("kind", "types"), FILES)
def test_values_and_logits(kind: str, types: dict[str, str], tmp_path: Path) -> None:
    whole = gguf_files.model(kind)
    values = gguf_files.write(tmp_path / "model.gguf", whole, kind, types)
    model = mk.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert type(model) is CLASSES[kind]

    # The whole model takes the file's values, by names that the file was written with.
    for name, tensor in gguf_files.tensors(whole, kind).items():
        tensor.copy_(values[name])
    formats = set()
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name)
        if isinstance(parameter, QuantizedWeight):
            formats.add(parameter.format.name)
            assert torch.equal(parameter.dequantize(torch.float32), expected), name
        else:
            assert torch.equal(parameter, expected), name
    assert formats == {READ_AS.get(value, value.lower()) for value in types.values() if value.startswith("Q")}
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-3)

    # Saved in our layout, it is the same again.
    model.save_pretrained(tmp_path / "saved")
    again = CLASSES[kind].from_pretrained(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["olmoe", "phimoe"])
def test_configuration(kind: str, tmp_path: Path) -> None:
    whole = gguf_files.model(kind)
    gguf_files.write(tmp_path / "model.gguf", whole, kind, {})
    config = mk.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    expected = whole.config.to_dict()
    for name, value in config.to_dict().items():
        if name == "rms_norm_eps":
            assert value == pytest.approx(expected[name], rel=1e-6)
        elif name == "rope_scaling" and value is not None:
            for key, wanted in expected[name].items():
                assert value[key] == (wanted if key == "type" else pytest.approx(wanted, rel=1e-6)), key
        elif name not in ("pad_token_id", "bos_token_id", "architectures"):
            assert value == expected[name], name
    # A config.json beside the file knows more.
    whole.config.save_pretrained(tmp_path)
    assert mk.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf") == whole.config


def test_parts_of_several_types(tmp_path: Path) -> None:
    """Gate and value are one stack here; where their types differ it is held whole."""
    whole = gguf_files.model("olmoe")
    values = gguf_files.write(tmp_path / "m.gguf", whole, "olmoe", {"gate_exps": "Q4_0", "up_exps": "Q8_0"})
    with pytest.warns(
        UserWarning, match=r"gate_up_proj: the checkpoint holds its parts differently \(int4, int8_groups\)"
    ):
        model = mk.OlmoeForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    gate, up = (values[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    assert torch.equal(stack, torch.cat([gate, up], dim=1))


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gguf_files.model("olmoe")
    path = tmp_path / "m.gguf"

    def check(message: str, name: str = "m.gguf", made: Any = mk.OlmoeForCausalLM) -> None:
        with pytest.raises((CheckpointError, ImportError), match=message):
            made.from_pretrained(tmp_path, gguf_file=name)

    check(r"missing.gguf: no such GGUF file", "missing.gguf")
    gguf_files.write(path, whole, "olmoe", {}, expert_count=None)
    check(r"m.gguf: the metadata lacks olmoe.expert_count")
    gguf_files.write(path, whole, "olmoe", {}, expert_count=5)
    check(r"m.gguf: num_experts in the configuration must be 4, as the weights have it, got 5")
    gguf_files.write(path, whole, "olmoe", {"exps": "Q8_0"})
    check(r"general.architecture must be 'phimoe' for PhimoeForCausalLM|PhimoeConfig", made=mk.PhimoeForCausalLM)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    check(r"m.gguf: not a readable GGUF file, it may be truncated")
    path.write_bytes(b"nothing of the kind")
    check(r"m.gguf: not a readable GGUF file")

    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    check(r"pip install 'moekernels\[gguf\]'")
