"""Experts that are quantised in the checkpoint are read as they are, codes and scales."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekernels.checkpoint import CheckpointError, repack
from moekernels.quantization import QuantizedWeight
from tests.expert_memory.conftest import load
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
WIDE: dict[str, dict[str, Any]] = {
    "olmoe": {"hidden_size": 64, "intermediate_size": 64},
    "nllb-moe": {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
#: One expert in the largest of the formats: four pages.
EXPERT = 16384


@pytest.fixture(scope="module")
def quantized(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def save(name: str, **config: Any) -> Path:
        key = repr((name, sorted(config.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            whole = saved(name, torch.bfloat16, **WIDE[name])
            load(name, whole, quantization_config=config).save_pretrained(made[key], max_shard_size=30_000)
        return made[key]

    return save


@pytest.mark.parametrize("packed", [False, True], ids=["saved", "repacked"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("olmoe", {"format": "int4", "group_size": 32}),
        ("olmoe", {"format": "q8_0"}),
        ("nllb-moe", {"format": "int4", "group_size": 32}),
        ("olmoe", {"load_in_8bit": True}),
        ("olmoe", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}),
        ("nllb-moe", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    ],
)
def test_same_bits(
    name: str, config: dict[str, Any], packed: bool, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    directory = quantized(name, **config)
    if packed:
        repack(directory, tmp_path / "packed", progress=False)
        directory = tmp_path / "packed"
    in_memory = load(name, directory)
    expected = in_memory(**tiny.inputs(name)).logits
    for budget in (EXPERT, "1GiB"):
        streamed = load(name, directory, expert_memory=budget)
        for _ in range(2):
            assert torch.equal(streamed(**tiny.inputs(name)).logits, expected)
        assert streamed.num_parameters() == in_memory.num_parameters()
    visited = next(streamed.expert_cache.visit(0, [0]))[0]
    assert isinstance(visited["down_proj"], QuantizedWeight)
    stats = streamed.expert_cache.stats()
    assert stats.bytes_read < stats.misses * 64 * 64 * 6 * 2  # of 16 bits


def test_autocast_and_float32(quantized: Callable[..., Path]) -> None:
    directory = quantized("nllb-moe", format="int4", group_size=32)
    for dtype in ("auto", "float32"):
        models = [load("nllb-moe", directory, dtype=dtype, **more) for more in ({}, {"expert_memory": EXPERT})]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
            first, second = (model(**tiny.inputs("nllb-moe")).logits for model in models)
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def test_what_cannot_be_done(quantized: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantise the checkpoint first, with moekernels quantize"):
        load("olmoe", saved("olmoe"), quantization_config={"format": "int4"}, expert_memory=EXPERT)
    with pytest.raises(ValueError, match=r"are quantised, and cannot be converted to torch\.float16"):
        repack(quantized("olmoe", format="q8_0"), tmp_path / "new", dtype=torch.float16)


def _changed(directory: Path, target: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the checkpoint in which one tensor is another."""
    shutil.copytree(directory, target)
    for file in target.glob("*.safetensors"):
        if name in (tensors := load_file(file)):
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, file, {"format": "pt"})
    return target


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_LAYER = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("config", "name", "size", "lead"),
    [
        ({"format": "int4", "group_size": 32}, f"{_LAYER}.down_proj.scales", 4 * 128, [4]),
        (_NF4, f"{_LAYER}.1.down_proj.weight.absmax", 64, []),
        (_NF4, f"{_LAYER}.1.down_proj.weight", 2048, []),
    ],
)
@pytest.mark.parametrize("by", [-4, 4])
def test_parts_of_another_size(
    config: dict[str, Any],
    name: str,
    size: int,
    lead: list[int],
    by: int,
    quantized: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """They would be read over their neighbours' memory."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten().repeat(2)[: size + by].view(*lead, -1)

    changed = _changed(quantized("olmoe", **config), tmp_path / "changed", name, other)
    with pytest.raises(CheckpointError, match=r"experts.*down_proj.* must be torch\..*, got torch\."):
        load("olmoe", changed, expert_memory=EXPERT)


def test_scales_that_have_to_be_put_in_order(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """As bitsandbytes leaves them after an evaluation pass on some CPUs."""
    changed = _changed(
        quantized("olmoe", **_NF4),
        tmp_path / "spoilt",
        f"{_LAYER}.1.down_proj.weight.absmax",
        lambda scales: scales.view(64, 1).t().bfloat16(),
    )
    with pytest.raises(CheckpointError, match=r"the scales of .*down_proj.* have to be put in order; load the model"):
        load("olmoe", changed, expert_memory=EXPERT)
    with pytest.warns(UserWarning, match="put in order"):
        load("olmoe", changed).save_pretrained(tmp_path / "mended")
    expected = load("olmoe", tmp_path / "mended")(**tiny.inputs("olmoe")).logits
    assert torch.equal(
        load("olmoe", tmp_path / "mended", expert_memory=EXPERT)(**tiny.inputs("olmoe")).logits, expected
    )
