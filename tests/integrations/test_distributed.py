"""The kernels in models of transformers 5 that it divides among processes itself, beside whole models of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.integrations import distributed
from tests.pipelines import checkpoints
from tests.processes import run_processes

VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (5, 24), reason="DistributedConfig with ep_size came with transformers 5")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(distributed.run, 2, str(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("way", distributed.WAYS)
@pytest.mark.parametrize("name", distributed.MODELS)
def test_register(found: list[dict[str, Any]], name: str, way: str) -> None:
    for rank in found:
        assert rank["not by the kernels"] == []
        for what, difference in rank[f"{name}, {way}"].items():
            assert difference < 2e-6, f"{what} are off by {difference}"


@pytest.mark.parametrize("name", distributed.MODELS)
def test_replaced_layers_under_fsdp(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert max(rank[f"{name}, FSDP, replaced"].values()) < 2e-6


@pytest.mark.parametrize("way", [way for way in distributed.WAYS if way != "FSDP"])
@pytest.mark.parametrize("name", distributed.MODELS)
def test_divided_experts_are_not_replaced(found: list[dict[str, Any]], name: str, way: str) -> None:
    """Their forward was taken before, and would be called as before."""
    for rank in found:
        told = rank[f"{name}, {way}, replaced"]
        assert "model.layers.0.mlp.experts" in told and "transformers has divided it among processes" in told
        assert "register()" in told and 'experts_implementation="moekernels"' in told


def test_a_misspelt_plan(found: list[dict[str, Any]]) -> None:
    assert ["layers.*.mlp.expert" in rank["misspelt"] for rank in found] == [True, True]


def test_the_example(tmp_path: Path) -> None:
    """As torchrun starts it, beside the same model on one process."""
    model = checkpoints.olmoe(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    alone = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = tokenizer("The quick", return_tensors="pt")
    tokens = alone.generate(**ids, max_new_tokens=5, do_sample=False)
    example = Path(__file__).parents[2] / "examples" / "transformers_expert_parallel.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--model", str(model), "--prompt", "The quick", "--max-new-tokens", "5"]
    ended = subprocess.run([*torchrun, example, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
