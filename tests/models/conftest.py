"""Checkpoints that transformers itself wrote, to hold our models against."""

from __future__ import annotations

import copy
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


#: The switches of Phi-3.5-MoE-instruct, but with a trained length that a test can pass.
TINY_PHIMOE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 16,
    },
    "attention_bias": True,
    "lm_head_bias": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


class Saved(NamedTuple):
    """A model of transformers, in evaluation mode, and the directory it saved itself to."""

    model: Any
    directory: Path


def _saved_by(
    tmp_path_factory: pytest.TempPathFactory, prefix: str, head: str, tiny: dict[str, Any]
) -> Callable[..., Saved]:
    """Makes tiny models of transformers with random weights, everything but norms at a scale where mistakes show."""
    made: dict[str, Saved] = {}

    def make(**overrides: Any) -> Saved:
        key = repr(sorted(overrides.items()))
        if key not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(len(made))
                config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy({**tiny, **overrides}))
                model = getattr(transformers, f"{prefix}{head}")(config).eval()
                for name, parameter in model.named_parameters():
                    if "norm" in name or "bias" in name:
                        mean = float("norm" in name and "bias" not in name)
                        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
                directory = tmp_path_factory.mktemp(prefix)
                model.save_pretrained(directory)
            made[key] = Saved(model, directory)
        return made[key]

    return make


@pytest.fixture(scope="session")
def saved_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    return _saved_by(tmp_path_factory, "Olmoe", "ForCausalLM", TINY)


@pytest.fixture(scope="session")
def saved_phimoe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    return _saved_by(tmp_path_factory, "Phimoe", "ForCausalLM", TINY_PHIMOE)


@pytest.fixture(scope="session")
def saved_phimoe_classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    return _saved_by(tmp_path_factory, "Phimoe", "ForSequenceClassification", TINY_PHIMOE)


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Two rows of eleven tokens, none of them padding."""
    return torch.randint(3, TINY["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(5))
