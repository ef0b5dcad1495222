"""Experts that are quantised in the checkpoint are read as they are, codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    foreign = quantized("olmoe", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(CheckpointError, match=r"as another library writes it; quantised experts are read one by one"):
        load("olmoe", foreign, expert_memory=EXPERT)
    with pytest.raises(ValueError, match=r"are quantised, and cannot be converted to torch\.float16"):
        repack(quantized("olmoe", format="q8_0"), tmp_path / "new", dtype=torch.float16)
