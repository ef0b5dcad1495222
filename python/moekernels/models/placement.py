"""A model on several devices: which part lies where, and how tensors follow.

A model consists of units, such as the embedding, a layer or the head, each of which lies on one device as a whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekernels._devices import Device, existing_device
from moekernels.checkpoint import parse_size
from moekernels.models.outputs import ModelOutput

DeviceMap = Device | Mapping[str, Device]

#: Values of `device_map` that leave the choice to us.
STRATEGIES = ("auto", "balanced", "sequential")
#: The share of a GPU's free memory that weights may take; the rest is for activations and caches.
_WEIGHTS_SHARE = 0.9


class Unit(NamedTuple):
    """A part of a model that is never split.

    Attributes:
        names: of the module; several where it is in several places. The first is that of its parameters.
        nbytes: size of its parameters, without those that belong to an earlier unit.
        has_weights: whether it has parameters, earlier ones included.
    """

    names: tuple[str, ...]
    nbytes: int
    has_weights: bool


def units(model: nn.Module, containers: tuple[type[nn.Module], ...], size: Callable[[str, Tensor], int]) -> list[Unit]:
    """The units of a model in the order of its definition.

    Args:
        model: on any device; its parameters need no memory.
        containers: classes of modules that may be split; units are the largest modules of other classes.
        size: bytes that a parameter will take, given its name.
    """
    names: dict[nn.Module, list[str]] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, containers):
                walk(f"{prefix}{name}.", child)
            else:
                names.setdefault(child, []).append(prefix + name)

    walk("", model)
    found: list[Unit] = []
    counted: set[int] = set()
    for module, paths in names.items():
        own = [(name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in counted]
        counted.update(id(parameter) for _, parameter in own)
        nbytes = sum(size(f"{paths[0]}.{name}", parameter) for name, parameter in own)
        found.append(Unit(tuple(paths), nbytes, next(module.parameters(), None) is not None))
    return found


class Placement:
    """The device of every unit."""

    def __init__(self, devices: Mapping[str, torch.device]) -> None:
        self.devices = dict(devices)

    @property
    def is_split(self) -> bool:
        return len(set(self.devices.values())) > 1

    def device_of(self, name: str) -> torch.device:
        """Where the parameter, buffer or module of that name belongs."""
        while name not in self.devices:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return next(iter(self.devices.values()))
        return self.devices[name]


def plan_placement(
    parts: Sequence[Unit], device_map: DeviceMap | None, max_memory: Mapping[int | str, int | str] | None = None
) -> Placement:
    """Choose a device for every unit.

    Args:
        parts: the units.
        device_map: one device for all; or names of modules and their devices, where "" is the whole model and longer
            names count more; or "auto" ("balanced"), which spreads the units evenly over the GPUs, and puts on the
            CPU what they have no room for; or "sequential", which fills one GPU after the other. None is the CPU.
        max_memory: for the strategies: the devices to use and the bytes that weights may take there, as a number or a
            string such as "10GB". By default nine tenths of what is free on each GPU.

    Raises:
        ValueError: a device is not there, or a map names no part of the model, splits one or leaves one out.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        rooms = _rooms(max_memory)
        chosen = spread([part.nbytes for part in parts], [room for _, room in rooms], even=device_map != "sequential")
        devices = [*(device for device, _ in rooms), torch.device("cpu")]
        return Placement({part.names[0]: devices[index] for part, index in zip(parts, chosen, strict=True)})
    if max_memory is not None:
        raise ValueError(f"max_memory is for device_map={' or '.join(map(repr, STRATEGIES))}, got {device_map!r}")
    if not isinstance(device_map, Mapping):
        device_map = {"": "cpu" if device_map is None else device_map}
    return Placement(_from_map(parts, {name: existing_device(device) for name, device in device_map.items()}))


def spread(sizes: Sequence[int], rooms: Sequence[int], *, even: bool) -> list[int]:
    """Distribute consecutive parts over devices.

    Args:
        sizes: of the parts.
        rooms: of the devices.
        even: keep the fullest device as empty as possible; otherwise fill one after the other.

    Returns:
        The index of every part's device; the parts that find no room, with all after them, have ``len(rooms)``.
    """

    def fill(limit: int) -> list[int]:
        indices, index, used = [], 0, 0
        for size in sizes:
            while index < len(rooms) and used + size > min(limit, rooms[index]):
                index, used = index + 1, 0
            indices.append(index)
            used += size
        return indices

    def fits(limit: int) -> bool:
        return fill(limit)[-1] < len(rooms)

    high = sum(sizes)
    if even and fits(high):
        low = 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return fill(high)


def _rooms(max_memory: Mapping[int | str, int | str] | None) -> list[tuple[torch.device, int]]:
    if max_memory is not None:
        given = {existing_device(device): parse_size(size) for device, size in max_memory.items()}
        # The CPU takes what is left.
        return [(device, size) for device, size in given.items() if device.type != "cpu"]
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [(torch.device("cuda", i), int(_WEIGHTS_SHARE * torch.cuda.mem_get_info(i)[0])) for i in gpus]


def _from_map(parts: Sequence[Unit], device_map: Mapping[str, torch.device]) -> dict[str, torch.device]:
    names = [name for part in parts for name in part.names]
    for key in device_map:
        if any(_is_within(name, key) for name in names):
            continue
        whole = next((name for name in names if _is_within(key, name)), None)
        if whole is not None:
            raise ValueError(f"device_map: {key!r} is a part of {whole!r}, which has to be on one device")
        near = difflib.get_close_matches(key, {*names, *(_parents(names))}, n=3, cutoff=0.0)
        raise ValueError(f"device_map: the model has no part {key!r}; near names: {', '.join(near)}")

    devices: dict[str, torch.device] = {}
    for part in parts:
        keys = [key for name in part.names for key in _by_length(device_map) if _is_within(name, key)]
        if keys:
            devices[part.names[0]] = device_map[keys[0]]
    missing = [part.names[0] for part in parts if part.has_weights and part.names[0] not in devices]
    if missing:
        raise ValueError(f'device_map: no device for {", ".join(missing)} ("" stands for the whole model)')
    main = next(iter(devices.values()))
    return {part.names[0]: devices.get(part.names[0], main) for part in parts}


def _by_length(device_map: Mapping[str, torch.device]) -> list[str]:
    return sorted(device_map, key=len, reverse=True)


def _is_within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _parents(names: Sequence[str]) -> set[str]:
    return {".".join(pieces[:i]) for name in names if (pieces := name.split(".")) for i in range(1, len(pieces))}


# Following.


def follow(model: nn.Module, containers: tuple[type[nn.Module], ...], placement: Placement) -> None:
    """Make tensors follow the parts of a split model.

    A unit takes its inputs to where its weights are, and its output stays there. A model, or one within it, takes its
    inputs to its own device, that of its first weights, and returns its outputs there; a cache stays where its layers
    are. Devices are looked up at every call, so that the model can still be moved.
    """
    for name in placement.devices:
        model.get_submodule(name).register_forward_pre_hook(_take_inputs, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, containers) and not isinstance(module, nn.ModuleList):
            module.register_forward_pre_hook(_take_inputs, with_kwargs=True)
            module.register_forward_hook(_return_outputs)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with all tensors on `device`, in tuples, lists, dictionaries and outputs too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, ModelOutput):
        fields: Any = dataclasses.replace
        return fields(value, **{name: moved(item, device) for name, item in value.items()})
    return value


def _weights_device(module: nn.Module) -> torch.device | None:
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else tensor.device


def _take_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    device = _weights_device(module)
    return None if device is None else (moved(args, device), moved(kwargs, device))


def _return_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    device = _weights_device(module)
    return output if device is None else moved(output, device)
