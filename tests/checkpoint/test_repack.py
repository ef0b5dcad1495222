"""A checkpoint written anew: the same weights, each expert in one piece."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from moekernels.checkpoint import KEY_MAPS, CheckpointError, CheckpointReader, packed, repack, tensor_offsets
from moekernels.models import OlmoeConfig, OlmoeForCausalLM
from tests.models import tiny

MODELS = ("olmoe", "phimoe", "nllb-moe", "switch_transformers", "m2m_100")


def saved(name: str, directory: Path, *, pickled: bool = False) -> Any:
    torch.manual_seed(1)
    model = tiny.head_class(name).from_config(tiny.CONFIGS[name])
    model.save_pretrained(directory, max_shard_size=20_000)
    (directory / "tokenizer.json").write_text("{}")
    if pickled:
        tensors = dict(item for shard in CheckpointReader(directory).shards() for item in list(shard))
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
    return model.eval()


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("name", MODELS)
def test_same_weights(name: str, pickled: bool, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "old", pickled=pickled)
    repack(tmp_path / "old", tmp_path / "new", max_shard_size=30_000, progress=False)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    loaded = tiny.head_class(name).from_pretrained(tmp_path / "new")
    for (key, weight), (other, expected) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(weight, expected), key
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    if name != "m2m_100":
        streamed = tiny.head_class(name).from_pretrained(tmp_path / "new", expert_memory=8192)
        with torch.no_grad():
            assert torch.equal(streamed(**tiny.inputs(name)).logits, model(**tiny.inputs(name)).logits)


class Place(NamedTuple):
    file: Path
    begin: int
    end: int


def test_each_expert_in_one_piece(tmp_path: Path) -> None:
    """With sizes that are whole blocks every tensor begins at a block, and gate, value and down follow each other."""
    config = OlmoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_experts=12
    )
    OlmoeForCausalLM.from_config(config).save_pretrained(tmp_path / "old")
    repack(tmp_path / "old", tmp_path / "new", max_shard_size=100_000, progress=False)
    reader = CheckpointReader(tmp_path / "new")
    offsets = {path: tensor_offsets(path) for path in reader.files}
    experts: dict[tuple[str, int], list[Place]] = {}
    for name, info in reader.tensors.items():
        place = KEY_MAPS["olmoe"].place(name)
        if place.expert is not None:
            begin = offsets[info.file][name]
            assert begin % packed.BLOCK == 0, name
            key = place.parameter.rpartition(".")[0], place.expert
            experts.setdefault(key, []).append(Place(info.file, begin, begin + info.nbytes))
    assert len(experts) == 24
    for places in experts.values():
        places.sort()
        assert {place.file for place in places} == {places[0].file}
        assert [place.begin for place in places[1:]] == [place.end for place in places[:-1]]
    # And expert behind expert, in their order.
    order = sorted(experts, key=lambda key: (experts[key][0].file.name, experts[key][0].begin))
    assert order == [(f"layers.{layer}.mlp.experts", e) for layer in range(2) for e in range(12)]


def test_quantised_experts_are_aligned(tmp_path: Path) -> None:
    """The shapes of weights, which are no whole blocks, come last."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    config = OlmoeConfig(**sizes, num_attention_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    OlmoeForCausalLM.from_config(config).save_pretrained(tmp_path / "old")
    quantized = OlmoeForCausalLM.from_pretrained(tmp_path / "old", quantization_config={"format": "int4"}).eval()
    quantized.save_pretrained(tmp_path / "int4")
    repack(tmp_path / "int4", tmp_path / "new", progress=False)
    reader = CheckpointReader(tmp_path / "new")
    offsets = {path: tensor_offsets(path) for path in reader.files}
    parts = [name for name in reader.tensors if ".experts." in name and not name.endswith(".shape")]
    assert len(parts) == 8
    for name in parts:
        assert offsets[reader.tensors[name].file][name] % packed.BLOCK == 0, name
    ids = torch.randint(3, 60, (1, 9))
    streamed = OlmoeForCausalLM.from_pretrained(tmp_path / "new", expert_memory=2**18)
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=ids).logits, quantized(input_ids=ids).logits)


def test_read_by_transformers(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "old")
    repack(tmp_path / "old", tmp_path / "new", max_shard_size=30_000, progress=False)
    theirs = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny.inputs("olmoe")).logits, model(**tiny.inputs("olmoe")).logits)


def test_stacks_become_experts(tmp_path: Path) -> None:
    """As transformers 5 has them in memory."""
    model = saved("phimoe", tmp_path / "old")
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name.replace("block_sparse_moe.experts", "mlp.experts")] = weight
    for path in (tmp_path / "old").glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    repack(tmp_path / "old", tmp_path / "new", progress=False)
    names = CheckpointReader(tmp_path / "new").tensors
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    loaded = tiny.head_class("phimoe").from_pretrained(tmp_path / "new")
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_another_dtype(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "old")
    repack(tmp_path / "old", tmp_path / "new", dtype=torch.bfloat16, progress=False)
    loaded = tiny.head_class("olmoe").from_pretrained(tmp_path / "new")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("olmoe", tmp_path / "old")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError) as caught:
        repack(tmp_path / "old", tmp_path / "new", progress=False)
    needed, free, missing = (float(x) for x in re.findall(r"([\d.]+) GB", str(caught.value)))
    assert free == 0.0
    assert missing == pytest.approx(needed - free, abs=0.011)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("olmoe", tmp_path / "old")

    def fills(tensor: torch.Tensor) -> memoryview:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "bytes_of", fills)
    with pytest.raises(OSError, match="No space left"):
        repack(tmp_path / "old", tmp_path / "new", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_repacked(tmp_path: Path) -> None:
    saved("olmoe", tmp_path / "old")
    with pytest.raises(ValueError, match="the output must be another directory"):
        repack(tmp_path / "old", tmp_path / "old")
    with pytest.raises(ValueError, match="size must be"):
        repack(tmp_path / "old", tmp_path / "new", max_shard_size="much")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"config\.json: model_type must be one of olmoe, .*, got 'bert'"):
        repack(tmp_path / "old", tmp_path / "new")


_SLOW = """
import sys, time
from moekernels.checkpoint import packed, repack
plain = packed.bytes_of
def slow(tensor):
    print("written", flush=True)
    time.sleep(0.05)
    return plain(tensor)
packed.bytes_of = slow
repack(sys.argv[1], sys.argv[2], progress=False)
"""


def test_killed(tmp_path: Path) -> None:
    """Nothing is in the place of the output, and the next run does it all."""
    model = saved("olmoe", tmp_path / "old")
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(tmp_path / "old"), str(tmp_path / "new")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "new").exists()
    repack(tmp_path / "old", tmp_path / "new", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    loaded = tiny.head_class("olmoe").from_pretrained(tmp_path / "new")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
