"""Steps of `from_pretrained`: arguments, weights, dtype, new weights."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def initialise(model: nn.Module, names: Sequence[str], init_weights: Callable[[nn.Module], None]) -> None:
    """Initialise the parameters of these names, and no others.

    Args:
        model: has the parameters.
        names: of parameters.
        init_weights: initialises what a module has itself, and maybe what its children have.
    """
    new = {id(model.get_parameter(name)) for name in names}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    parents = dict.fromkeys(owner.rpartition(".")[0] for owner in owners)
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in [model.get_submodule(name) for name in (*owners, *parents)]:
        # While the others are on the meta device, writing to them does nothing.
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and id(parameter) not in new and not parameter.is_meta:
                    held.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"))
        init_weights(module)
    for part, name, parameter in held:
        part._parameters[name] = parameter


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
