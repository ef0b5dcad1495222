"""Tiny M2M100 and NLLB-MoE checkpoints that transformers itself wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from moekernels.models import M2M100ForConditionalGeneration, NllbMoeForConditionalGeneration

VOCAB, HIDDEN, PAD = 97, 32, 1

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "init_std": 0.2,
    "max_position_embeddings": 24,
}
SPARSE: dict[str, Any] = {"num_experts": 6, "encoder_sparse_step": 2, "decoder_sparse_step": 1}

THEIRS = {
    "m2m_100": (transformers.M2M100Config, transformers.M2M100ForConditionalGeneration),
    "nllb-moe": (transformers.NllbMoeConfig, transformers.NllbMoeForConditionalGeneration),
}
OURS: dict[str, Any] = {"m2m_100": M2M100ForConditionalGeneration, "nllb-moe": NllbMoeForConditionalGeneration}


class Pair(NamedTuple):
    """A model of transformers with eager attention, ours with the same weights, and the checkpoint."""

    theirs: Any
    ours: Any
    directory: Path


def write(directory: Path, kind: str, **overrides: Any) -> Any:
    """A model of transformers with random weights at a scale where mistakes show, saved to `directory`."""
    config_class, model_class = THEIRS[kind]
    fields = {**TINY, **(SPARSE if kind == "nllb-moe" else {}), **overrides}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = model_class._from_config(config_class(**fields), attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.2)
        model.save_pretrained(directory)
    return model


def pair(directory: Path, kind: str, implementation: str = "sdpa", **overrides: Any) -> Pair:
    theirs = write(directory, kind, **overrides)
    ours = OURS[kind].from_pretrained(directory, attn_implementation=implementation, progress=False)
    return Pair(theirs, ours, directory)


def batch() -> dict[str, Tensor]:
    """Two sources, one of them padded, and two targets of six tokens."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, VOCAB, (2, 9), generator=generator)
    mask = torch.ones_like(source)
    mask[0, -3:] = 0
    target = torch.randint(3, VOCAB, (2, 6), generator=generator)
    return {"input_ids": source.masked_fill(mask == 0, PAD), "attention_mask": mask, "decoder_input_ids": target}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
