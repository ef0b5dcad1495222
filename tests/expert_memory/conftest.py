"""Small checkpoints of the models with experts, and their two ways into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.expert_memory import ExpertCache
from tests.models import tiny

MODELS = ("olmoe", "phimoe", "nllb-moe", "switch_transformers")
#: What one expert of these models takes at most: two pages.
EXPERT = 8192


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a checkpoint, in small shards, with weights that make experts and tokens differ."""
    made: dict[str, Path] = {}

    def save(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        key = repr((name, dtype, sorted(fields.items())))
        if key not in made:
            torch.manual_seed(len(made))
            config = tiny.CONFIGS[name].__class__.from_dict({**tiny.CONFIGS[name].to_dict(), **fields})
            model = tiny.head_class(name).from_config(config, dtype=dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.3)
            made[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[key], max_shard_size=20_000)
        return made[key]

    return save


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """In-memory models then take the path of inference too, whose bits may be other than those of training."""
    with torch.no_grad():
        yield


def load(name: str, directory: Path, **options: Any) -> Any:
    return tiny.head_class(name).from_pretrained(directory, **options)


def counts(cache: ExpertCache) -> tuple[int, int, int]:
    """Hits, misses and evictions."""
    stats = cache.stats()
    assert stats.bytes_in_memory <= stats.budget
    return stats.hits, stats.misses, stats.evictions


def everything(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in everything(item)]
    if dataclasses.is_dataclass(output):
        return [tensor for field in dataclasses.fields(output) for tensor in everything(getattr(output, field.name))]
    return []
