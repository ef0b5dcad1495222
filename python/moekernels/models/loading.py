"""Steps of `from_pretrained`: arguments, weights, dtype, new weights."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint import CheckpointReader, StateDictReader
from moekernels.models.configuration import PretrainedConfig

#: Keywords that change nothing here: no code of a checkpoint is ever run, and no weight is ever in memory twice.
WITHOUT_EFFECT = frozenset(
    (
        "_fast_init",
        "code_revision",
        "low_cpu_mem_usage",
        "offload_buffers",
        "offload_state_dict",
        "resume_download",
        "trust_remote_code",
        "weights_only",
    )
)


def overridden(config: PretrainedConfig, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of the configuration with other values in some of its fields.

    Raises:
        ValueError: it has no such field, or the value is none the field can have.
    """
    unknown = sorted(name for name, value in fields.items() if value is not None and not hasattr(config, name))
    if unknown:
        raise ValueError(f"from_pretrained: neither arguments nor fields of the configuration: {', '.join(unknown)}")
    config = copy.deepcopy(config)
    for name, value in fields.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.validate()
    return config


def open_weights(
    directory: str | os.PathLike[str] | None,
    state_dict: Mapping[str, Tensor] | None,
    use_safetensors: bool | None,
    variant: str | None,
) -> CheckpointReader | StateDictReader:
    """The weights in a directory, or those given instead."""
    if state_dict is not None:
        return StateDictReader(state_dict)
    if directory is None:
        raise ValueError("from_pretrained: neither a checkpoint nor a state_dict is given")
    return CheckpointReader(directory, use_safetensors, variant)


def stored_dtype(reader: CheckpointReader | StateDictReader) -> torch.dtype:
    """The dtype of the first floating-point weight."""
    for info in reader.tensors.values():
        if info.dtype is not None and info.dtype.is_floating_point:
            return info.dtype
    return torch.get_default_dtype()


def warn_of_new_weights(model: str, absent: list[str], mismatched: list[tuple[str, Any, Any]]) -> None:
    """Say which weights are not the checkpoint's."""
    reasons = []
    if absent:
        reasons.append(f"the checkpoint has no {', '.join(absent)}")
    if mismatched:
        shapes = (f"{name} {list(expected)} (it has {list(found)})" for name, found, expected in mismatched)
        reasons.append(f"the checkpoint does not fit {', '.join(shapes)}")
    if reasons:
        warnings.warn(f"{model}: {'; '.join(reasons)}; initialised, to be trained", stacklevel=3)
