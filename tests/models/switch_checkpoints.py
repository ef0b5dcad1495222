"""Tiny Switch Transformers checkpoints that transformers itself wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from moekernels.models import SwitchTransformersForConditionalGeneration

VOCAB, HIDDEN, PAD = 97, 32, 0

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 6,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_sparse_decoder_layers": 1,
    "num_experts": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}


class Pair(NamedTuple):
    """A model of transformers, ours with the same weights, and the checkpoint."""

    theirs: Any
    ours: Any
    directory: Path


def write(directory: Path, **overrides: Any) -> Any:
    """A model of transformers with random weights at a scale where mistakes show, saved to `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        config = transformers.SwitchTransformersConfig(**{**TINY, **overrides})
        model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "relative" in name:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
            elif "classifier" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory)
    return model


def pair(directory: Path, implementation: str = "sdpa", **overrides: Any) -> Pair:
    theirs = write(directory, **overrides)
    ours = SwitchTransformersForConditionalGeneration.from_pretrained(
        directory, attn_implementation=implementation, progress=False
    )
    return Pair(theirs, ours, directory)


def batch() -> dict[str, Tensor]:
    """Two sources, one of them padded, and two targets of six tokens."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, VOCAB, (2, 23), generator=generator)
    mask = torch.ones_like(source)
    mask[0, -4:] = 0
    target = torch.randint(3, VOCAB, (2, 6), generator=generator)
    return {"input_ids": source.masked_fill(mask == 0, PAD), "attention_mask": mask, "decoder_input_ids": target}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def reloaded(directory: Path) -> Any:
    return SwitchTransformersForConditionalGeneration.from_pretrained(directory, progress=False)
