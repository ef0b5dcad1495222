"""A small model of two layers, and its checkpoint, written and read without the models package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moekernels.checkpoint import KEY_MAPS, CheckpointReader, load_checkpoint

EXPERTS, HIDDEN, FFN = 3, 4, 2


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * FFN, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, FFN))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(2))


class Small(nn.Module):
    """Named as OLMoE names its parts."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.model = Base()
        self.lm_head = nn.Linear(HIDDEN, 5, bias=False)
        self.register_buffer("scale", torch.ones(2, device="cpu"), persistent=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def hub_tensors() -> dict[str, Tensor]:
    """What a checkpoint of the hub holds: one tensor per expert and projection."""
    tensors = {"model.embed_tokens.weight": torch.randn(5, HIDDEN), "lm_head.weight": torch.randn(5, HIDDEN)}
    for layer in range(2):
        for e in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{e}"
            tensors[f"{prefix}.gate_proj.weight"] = torch.randn(FFN, HIDDEN)
            tensors[f"{prefix}.up_proj.weight"] = torch.randn(FFN, HIDDEN)
            tensors[f"{prefix}.down_proj.weight"] = torch.randn(HIDDEN, FFN)
    return tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return hub_tensors()


def write_single(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")


def write_sharded(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Alternating between two files, so that one expert's projections are in different ones."""
    files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_pickle(directory: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def write_old_pickle(directory: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_pickle(directory: Path, tensors: dict[str, Tensor]) -> None:
    files = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


FORMATS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "safetensors": write_single,
    "sharded-safetensors": write_sharded,
    "pickle": write_pickle,
    "old-pickle": write_old_pickle,
    "sharded-pickle": write_sharded_pickle,
}


def load(directory: Path, model: type[nn.Module] = Small, **options: Any) -> Any:
    """A model filled from the checkpoint in `directory`."""
    with torch.device("meta"):
        empty = model(**options.pop("arguments", {}))
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "progress": False, **options}
    load_checkpoint(empty, CheckpointReader(directory), KEY_MAPS["olmoe"], **settings)
    return empty


def assert_loaded(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The model holds what the checkpoint of the hub does."""
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    for i, layer in enumerate(model.model.layers):
        for e in range(EXPERTS):
            prefix = f"model.layers.{i}.mlp.experts.{e}"
            gate, up = layer.mlp.experts.gate_up_proj[e].split(FFN)
            assert torch.equal(gate, tensors[f"{prefix}.gate_proj.weight"])
            assert torch.equal(up, tensors[f"{prefix}.up_proj.weight"])
            assert torch.equal(layer.mlp.experts.down_proj[e], tensors[f"{prefix}.down_proj.weight"])
