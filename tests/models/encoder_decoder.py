"""What the tests of all encoder-decoder models do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moekernels.nn import DynamicCache, EncoderDecoderCache, StaticCache


def rewrite(source: Path, directory: Path, tensors: dict[str, Tensor], pickled: bool = False) -> None:
    """Write the checkpoint in `source` with other tensors."""
    (directory / "config.json").write_text((source / "config.json").read_text())
    if pickled:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")


def decode_in_pieces(
    model: Any, inputs: dict[str, Tensor], target: Tensor, mask: Tensor | None, cache_kind: str
) -> Tensor:
    """Logits of a target ``[2, 6]`` through a cache: a prefix, a chunk on top of it, then a single token."""
    cache = EncoderDecoderCache(StaticCache(model.config, 2, 8) if cache_kind == "static" else DynamicCache())
    encoded = model.get_encoder()(**inputs)
    pieces = []
    for start, stop in [(0, 3), (3, 5), (5, 6)]:
        out = model(
            encoder_outputs=encoded,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=target[:, start:stop],
            decoder_attention_mask=None if mask is None else mask[:, :stop],
            past_key_values=cache,
        )
        assert out.past_key_values is cache and cache.get_seq_length() == stop
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)
