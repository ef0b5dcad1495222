"""Replacing a model takes no memory; a training step of what was replaced, no second copy of weights or gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_MIB = 2**20
_EXPERTS_MIB = 96
# Of one layer: 256 tokens with 4 experts each, float32; the up-projection, its gradient and the inner activation.
_ROWS_MIB = 256 * 4 * (2 * 512 + 2 * 512 + 512) * 4 / _MIB

_RUN = """
import sys
from pathlib import Path
import torch
import transformers
from moekernels.integrations.transformers import replace_moe_layers

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def grown(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before

def model_of(hidden_size, num_experts):
    config = transformers.OlmoeConfig(
        hidden_size=hidden_size, intermediate_size=512, num_experts=num_experts, num_experts_per_tok=4,
        num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
    )
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(config)

def step(model):
    ids = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()

torch.set_num_threads(1)
ours = sys.argv[1] == "ours"
warm, model = model_of(32, 4), model_of(256, 32)
if ours:
    replace_moe_layers(warm)
step(warm)  # what is loaded but once
print(grown(lambda: replace_moe_layers(model) if ours else None), grown(lambda: step(model)))
"""


def _grown(side: str) -> list[int]:
    result = subprocess.run([sys.executable, "-c", _RUN, side], check=True, capture_output=True, text=True, timeout=300)
    return [int(number) for number in result.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_peaks() -> None:
    _, stock = _grown("stock")
    replacing, ours = _grown("ours")
    assert stock > _EXPERTS_MIB * _MIB, "gradients are as large as the experts"
    assert replacing < 0.01 * _EXPERTS_MIB * _MIB, f"{replacing / _MIB:.2f} MiB"
    # Stock computes expert by expert, the kernels all rows of a layer.
    assert ours < stock + _ROWS_MIB * _MIB, f"{ours / _MIB:.1f} MiB for {stock / _MIB:.1f}"
