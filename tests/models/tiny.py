"""A tiny model of every architecture, with and without its head, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moekernels as mk
from moekernels.models.auto import ARCHITECTURES

_TRANSLATION: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, mk.PretrainedConfig] = {
    "olmoe": mk.OlmoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=2,
    ),
    "phimoe": mk.PhimoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=1,
    ),
    "m2m_100": mk.M2M100Config(**_TRANSLATION),
    "nllb-moe": mk.NllbMoeConfig(**_TRANSLATION, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2),
    "switch_transformers": mk.SwitchTransformersConfig(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        decoder_start_token_id=0,
    ),
}


def base_class(name: str) -> Any:
    """The class without a head."""
    return ARCHITECTURES[name].base


def head_class(name: str) -> Any:
    """The class with a language-modelling head."""
    return ARCHITECTURES[name].causal_lm or ARCHITECTURES[name].seq2seq_lm


def inputs(name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Two rows, the second one padded on the left."""
    ids = torch.tensor([[5, 9, 12, 33, 4], [1, 1, 8, 17, 40]]).to(device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).to(device)
    given = {"input_ids": ids, "attention_mask": mask}
    return {**given, "decoder_input_ids": ids[:, :3]} if CONFIGS[name].is_encoder_decoder else given
