"""Tiny checkpoints of every architecture, whole and as transformers quantises them with bitsandbytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor, nn

from tests.models import switch_checkpoints, translation_checkpoints
from tests.models.conftest import TINY, TINY_PHIMOE
from tests.quantization.bitsandbytes_values import four_bit_values

MODELS = ("olmoe", "phimoe", "m2m_100", "nllb-moe", "switch_transformers")
_FFN = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 64}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", "ForCausalLM", {**TINY, "num_experts": 4, "num_hidden_layers": 2}),
    "phimoe": ("Phimoe", "ForCausalLM", {**TINY_PHIMOE, "num_local_experts": 3, "num_hidden_layers": 2}),
    "m2m_100": ("M2M100", "ForConditionalGeneration", {**translation_checkpoints.TINY, **_FFN, "encoder_layers": 2}),
    "nllb-moe": (
        "NllbMoe",
        "ForConditionalGeneration",
        {**translation_checkpoints.TINY, **_FFN, **translation_checkpoints.SPARSE, "num_experts": 3},
    ),
    "switch_transformers": (
        "SwitchTransformers",
        "ForConditionalGeneration",
        {**switch_checkpoints.TINY, "d_kv": 16, "d_ff": 96, "num_experts": 3, "num_layers": 2, "num_decoder_layers": 2},
    ),
}
#: Wide enough for whole groups of every format.
_WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "d_model": 64}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def their_class(kind: str) -> Any:
    prefix, head, _ = _CONFIGS[kind]
    return getattr(transformers, prefix + head)


def write(directory: Path, kind: str) -> Any:
    """A model of transformers with random weights in evaluation mode, saved."""
    prefix, head, fields = _CONFIGS[kind]
    fields = {name: _WIDTHS.get(name, value) for name, value in fields.items()}
    if "rope_scaling" in fields:
        fields["rope_scaling"] = {**fields["rope_scaling"], "short_factor": [1.1] * 8, "long_factor": [2.5] * 8}
    with quiet():
        torch.manual_seed(3)
        model = getattr(transformers, prefix + head)(getattr(transformers, f"{prefix}Config")(**fields)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                nn.init.normal_(parameter, mean=float("norm" in name and "bias" not in name), std=0.2)
            elif "classifier" in name or "gate.weight" in name:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(directory)
    return model


def write_quantized(directory: Path, source: Path, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The model in `source` as transformers quantises it, saved to `directory`."""
    with quiet():
        model = their_class(kind).from_pretrained(
            source, quantization_config=transformers.BitsAndBytesConfig(**fields), dtype=dtype, device_map="cpu"
        )
        model.eval().save_pretrained(directory)
    return model


def load_theirs(directory: Path, kind: str, **kwargs: Any) -> Any:
    with quiet():
        return their_class(kind).from_pretrained(directory, device_map="cpu", **kwargs).eval()


def values(layer: nn.Module) -> Tensor:
    """What bitsandbytes has for the weight of a layer that it quantised, float32."""
    weight: Any = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return weight.data.float() * weight.SCB.unsqueeze(1) * (1 / 127)
    return four_bit_values(weight.data, weight.quant_state).to(weight.quant_state.dtype).float()


def with_values(model: Any, source: Path, kind: str) -> Any:
    """The whole model in `source` with the values that a quantised one has, which float32 rounds no further."""
    whole = load_theirs(source, kind, dtype=torch.float32)
    for name, layer in model.named_modules():
        target = whole.get_submodule(name)
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            target.weight.data = values(layer)
        elif isinstance(layer, nn.Linear):
            target.weight.data = layer.weight.data.float()
    return whole


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    if kind in ("olmoe", "phimoe"):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
