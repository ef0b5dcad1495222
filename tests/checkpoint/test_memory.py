"""Loading takes no more memory than the model and one shard. Files that are mapped count, like all resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.models import OlmoeConfig, OlmoeForCausalLM

_LAYERS = 8
_MIB = 2**20

_LOAD = """
import sys
from pathlib import Path
from moekernels.models import OlmoeForCausalLM

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

directory, small, dtype, format = sys.argv[1:]
quantized = {"quantization_config": {"format": format}} if format else {}
OlmoeForCausalLM.from_pretrained(small, **quantized)  # what is loaded but once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = OlmoeForCausalLM.from_pretrained(directory, dtype=dtype, **quantized)
print(resident("VmHWM") - before, model.get_memory_footprint())
"""


def _config(**fields: Any) -> OlmoeConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_experts": 16}
    return OlmoeConfig(**{**sizes, "vocab_size": 512, "num_hidden_layers": _LAYERS, **fields})


def _write(directory: Path, config: OlmoeConfig, pickled: bool) -> int:
    """A checkpoint in shards of about a layer each; the size of the largest."""
    directory.mkdir()
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model.to_empty(device="cpu")
    if not pickled:
        model.save_pretrained(directory, max_shard_size="8MB")
        return max(path.stat().st_size for path in directory.glob("*.safetensors"))
    config.save_pretrained(directory)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if name.startswith("model.layers") else "0"
        shards.setdefault(f"pytorch_model-{layer}.bin", {})[name] = tensor
    for file, tensors in shards.items():
        torch.save(tensors, directory / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max((directory / file).stat().st_size for file in shards)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize(("pickled", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_peak_of_loading(pickled: bool, dtype: str, tmp_path: Path) -> None:
    shard = _write(tmp_path / "model", _config(), pickled)
    _write(tmp_path / "small", _config(num_hidden_layers=1, num_experts=8), pickled=False)
    peak, model = _peak(tmp_path, dtype)
    assert model > 3 * shard
    assert peak < model + shard + 4 * _MIB, f"{peak / _MIB:.0f} MiB for {model / _MIB:.0f} and {shard / _MIB:.0f}"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_peak_of_quantising(tmp_path: Path) -> None:
    """One file of four times the result: what was read of it is given back."""
    (tmp_path / "model").mkdir()
    config = _config(hidden_size=256, intermediate_size=512, num_hidden_layers=5)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model.bfloat16().to_empty(device="cpu").save_pretrained(tmp_path / "model")
    _write(tmp_path / "small", _config(num_hidden_layers=1, num_experts=8), pickled=False)
    file = (tmp_path / "model" / "model.safetensors").stat().st_size
    peak, size = _peak(tmp_path, "bfloat16", "int4")
    assert 3.4 * size < file
    # Beside the model there is what quantising one matrix needs.
    assert peak < 1.15 * size + 10 * _MIB, f"{peak / _MIB:.1f} MiB for {size / _MIB:.1f} of {file / _MIB:.1f}"


def _peak(directory: Path, dtype: str, format: str = "") -> tuple[int, int]:
    """How far memory rises over what it was when the model is loaded, and what the model takes."""
    arguments = [str(directory / "model"), str(directory / "small"), dtype, format]
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, *arguments], check=True, capture_output=True, text=True, timeout=120
    )
    peak, model = map(int, result.stdout.split())
    return peak, model


_QUANTIZE = """
import sys
from pathlib import Path
from moekernels.models import BitsAndBytesConfig, QuantizationConfig
from moekernels.models.converting import quantize_checkpoint

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

directory, small, format = sys.argv[1:]
config = BitsAndBytesConfig(load_in_8bit=True) if format == "int8" else QuantizationConfig(format)
quantize_checkpoint(small, small + "-quantized", config)  # what is loaded but once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
size = quantize_checkpoint(directory, directory + "-quantized", config)
print(resident("VmHWM") - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_peak_of_quantising_a_checkpoint(format: str, tmp_path: Path) -> None:
    """Neither the result nor a stack of experts is in memory, but what is quantised at a time."""
    config = _config(hidden_size=512, intermediate_size=2048, num_experts=64, num_hidden_layers=1, vocab_size=64)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model.bfloat16().to_empty(device="cpu").save_pretrained(tmp_path / "model")
    _write(tmp_path / "small", _config(num_hidden_layers=1, num_experts=8), pickled=False)
    result = subprocess.run(
        [sys.executable, "-c", _QUANTIZE, str(tmp_path / "model"), str(tmp_path / "small"), format],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    peak, size = map(int, result.stdout.split())
    stack = 64 * 2 * 2048 * 512 * 2
    assert size > 0.25 * 1.5 * stack and peak < 0.5 * stack, f"{peak / _MIB:.0f} MiB for {size / _MIB:.0f}"
