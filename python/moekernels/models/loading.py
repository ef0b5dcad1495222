"""Steps of `from_pretrained`: arguments, weights, dtype, new weights."""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekernels.checkpoint import CheckpointReader, Reader, StateDictReader
from moekernels.checkpoint.quantized import QuantizedReader, check_whole
from moekernels.models.configuration import PretrainedConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Unfilled(TorchFunctionMode):
    """`torch.nn.init` leaves tensors on the meta device alone: to draw nothing, torch imports its compiler (80 MB)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **kwargs)


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
    quantization_config: Mapping[str, Any] | None,
) -> Reader:
    """The weights in a directory, or those given instead; quantised ones are put together as a configuration says."""
    reader: Reader
    if state_dict is not None:
        reader = StateDictReader(state_dict)
        if any(info.format is not None for info in reader.tensors.values()):
            return reader  # of a model in memory
    elif directory is None:
        raise ValueError("from_pretrained: neither a checkpoint nor a state_dict is given")
    else:
        reader = CheckpointReader(directory, use_safetensors, variant)
    if quantization_config:
        return QuantizedReader(reader, quantization_config)
    check_whole(reader)
    return reader


def on_every_rank(load: Callable[_P, _R]) -> Callable[_P, _R]:
    """A `from_pretrained` whose `mesh`, if there is one, divides the experts: all ranks load, or none does."""

    @functools.wraps(load)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        mesh: Any = kwargs.get("mesh")
        names = ("dispatch", "sums", "rows_per_rank")
        options: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        if mesh is None:
            if options:
                raise ValueError(f"from_pretrained: {', '.join(options)} without a mesh")
            return load(*args, **kwargs)
        from moekernels.distributed import expert_parallel, together

        with together("from_pretrained", mesh.get_group()):
            result: Any = load(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        expert_parallel(model, mesh, are_local=True, **options)
        return result

    return wrapped


def held_by_ranks(model: nn.Module) -> bool:
    """Whether processes hold parameters of the model together, as DTensors."""
    # Without its module being there, none was made; importing it takes a second.
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())


def held_experts(model: nn.Module, mesh: DeviceMesh | None) -> dict[str, range]:
    """The experts that this rank is to read, by the names of their stacks; nothing without a mesh."""
    if mesh is None:
        return {}
    from moekernels.distributed import held_parameters

    return held_parameters(model, mesh)


def stored_dtype(reader: Reader) -> torch.dtype:
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
