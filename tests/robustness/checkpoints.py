"""True checkpoints of the five models, tokenizers included, small enough to break thousands of times."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS
from moekernels.tokenizers import AutoTokenizer
from tests.models import tiny
from tests.tokenizers import sentencepiece_builders as builders


def _olmoe_tokenizer(directory: Path) -> None:
    LEARNERS["olmoe"].create(Corpus()).tokenizer.save_pretrained(directory)


_TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "olmoe": _olmoe_tokenizer,
    "phimoe": builders.llama_fast,
    "m2m_100": builders.m2m_100,
    "nllb-moe": builders.nllb,
    "switch_transformers": builders.t5,
}
MODELS = tuple(_TOKENIZERS)
FORMATS = ("single", "sharded", "pickle")


def write(directory: Path, name: str, weights: str = "single") -> None:
    """A checkpoint of a model with new weights.

    Args:
        directory: an empty directory.
        name: of the architecture.
        weights: "single" file or "sharded", both safetensors; or "pickle".
    """
    _TOKENIZERS[name](directory)
    config = copy.deepcopy(tiny.CONFIGS[name])
    config.vocab_size = len(AutoTokenizer.from_pretrained(directory)) + 8
    torch.manual_seed(0)
    model = tiny.head_class(name)(config)
    model.save_pretrained(directory, max_shard_size="20KB" if weights == "sharded" else "5GB")
    if weights == "pickle":
        single = directory / "model.safetensors"
        from safetensors.torch import load_file

        torch.save(load_file(single), directory / "pytorch_model.bin")
        single.unlink()


def write_all(root: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Checkpoints of every model in every format, each in a directory of its own."""
    directories = []
    for name in MODELS:
        for weights in formats:
            directory = root / f"{name}-{weights}"
            directory.mkdir(parents=True)
            write(directory, name, weights)
            directories.append(directory)
    return directories


def inputs(config: Any) -> dict[str, torch.Tensor]:
    """Three tokens that the vocabulary has."""
    ids = torch.tensor([[5, 9, 12]]) % config.vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
