"""Checkpoints that transformers itself wrote, to hold our models against."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


class Saved(NamedTuple):
    """A model of transformers, in evaluation mode, and the directory it saved itself to."""

    model: Any
    directory: Path


@pytest.fixture(scope="session")
def saved_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Makes a tiny OLMoE with random weights, everything but norms at a scale where mistakes show."""
    made: dict[str, Saved] = {}

    def make(**overrides: Any) -> Saved:
        key = repr(sorted(overrides.items()))
        if key not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(len(made))
                config = transformers.OlmoeConfig(**{**TINY, **overrides})
                model = transformers.OlmoeForCausalLM(config).eval()
                for name, parameter in model.named_parameters():
                    if "norm" in name or "bias" in name:
                        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
                directory = tmp_path_factory.mktemp("olmoe")
                model.save_pretrained(directory)
            made[key] = Saved(model, directory)
        return made[key]

    return make


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Two rows of eleven tokens, none of them padding."""
    return torch.randint(3, TINY["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(5))
