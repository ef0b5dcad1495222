"""Quantised weights: what is asked for, and what is done instead."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from moekernels.checkpoint import CheckpointError
from moekernels.models.configuration import PretrainedConfig, parse_dtype

_4BIT_TYPES = ("fp4", "nf4")


@dataclass
class BitsAndBytesConfig:
    """What bitsandbytes would do with a model's weights. `from_pretrained` takes it, but does not quantise (yet).

    Raises:
        ValueError: the fields contradict each other, or one has a value that bitsandbytes does not know.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("BitsAndBytesConfig: set load_in_4bit or load_in_8bit, not both")
        if self.bnb_4bit_quant_type not in _4BIT_TYPES:
            raise ValueError(
                f"BitsAndBytesConfig: bnb_4bit_quant_type must be one of {', '.join(_4BIT_TYPES)}, "
                f"got {self.bnb_4bit_quant_type!r}"
            )
        self.bnb_4bit_compute_dtype = parse_dtype(self.bnb_4bit_compute_dtype) or torch.float32

    @property
    def bits(self) -> int | None:
        """The bits of a weight; None if they are not to be quantised."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


def requested_bits(config: PretrainedConfig, asked: Any, load_in_8bit: bool, load_in_4bit: bool) -> int | None:
    """The bits that the weights are to be quantised to, if any.

    Args:
        config: the checkpoint's configuration.
        asked: the argument `quantization_config`: None, a :class:`BitsAndBytesConfig`, or its fields.
        load_in_8bit, load_in_4bit: the arguments, which count where there is no `quantization_config`.

    Raises:
        CheckpointError: the weights in the checkpoint are quantised.
        ValueError: `asked` is something else.
    """
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        raise CheckpointError(
            f"{config.name_or_path or 'the checkpoint'}: its weights are quantised ({method or 'no method named'}), "
            "which is not supported; load the checkpoint they were made from"
        )
    if asked is None:
        asked = BitsAndBytesConfig(load_in_8bit, load_in_4bit)
    if isinstance(asked, dict):
        asked = BitsAndBytesConfig(**{name: value for name, value in asked.items() if name != "quant_method"})
    if not isinstance(asked, BitsAndBytesConfig):
        raise ValueError(f"quantization_config must be a BitsAndBytesConfig, got {type(asked).__name__}")
    return asked.bits


def warn_of_whole_weights(bits: int | None, dtype: torch.dtype) -> None:
    """Says that the weights are in a dtype, if they were to have so many bits."""
    if bits is not None:
        warnings.warn(
            f"weights are not quantised to {bits} bits, which is not supported yet: they stay "
            f"{str(dtype).removeprefix('torch.')}, and take {dtype.itemsize * 8 // bits} times the memory",
            stacklevel=3,
        )
