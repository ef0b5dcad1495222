"""Bringing a checkpoint's tensors into a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.keymap import KeyMap, Place
from moekernels.checkpoint.reader import CheckpointReader, StateDictReader, TensorInfo

_SHOWN = 8  # problems that an error lists before it only counts them


@dataclass
class _Target:
    """One parameter under all the names it has, the preferred one first."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    #: (expert, part) -> name in the checkpoint; (None, 0) is the whole parameter.
    sources: dict[tuple[int | None, int], str] = field(default_factory=dict)


@dataclass
class _LoadPlan:
    """What goes where, and what is wrong with it."""

    copies: dict[str, tuple[_Target, Place]] = field(default_factory=dict)
    absent: list[_Target] = field(default_factory=list)
    #: Name in the checkpoint -> target, shape in the checkpoint, and the shape it must have.
    mismatched: dict[str, tuple[_Target, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class LoadReport(NamedTuple):
    """What was not as it could be.

    Attributes:
        absent: parameters that the checkpoint lacks; they are allocated but not initialised.
        mismatched: parameters the checkpoint has in another shape, that shape and theirs; not initialised either.
        ignored: tensors of the checkpoint that the model has no use for.
    """

    absent: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    ignored: list[str]

    def as_loading_info(self) -> dict[str, Any]:
        """Under the names that transformers uses."""
        return {
            "missing_keys": self.absent,
            "unexpected_keys": self.ignored,
            "mismatched_keys": self.mismatched,
            "error_msgs": [],
        }


def load_checkpoint(
    model: nn.Module,
    reader: CheckpointReader | StateDictReader,
    key_map: KeyMap,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
    keep_float32: Callable[[str], bool] = lambda name: False,
    may_be_absent: Callable[[str], bool] = lambda name: False,
    ignore_mismatched: bool = False,
    progress: bool | None = None,
) -> LoadReport:
    """Fill a model that was built on the meta device.

    Every parameter is allocated once, in its final dtype on its final device, and every tensor of the checkpoint is
    copied once, straight to its place; one expert's tensor into its slice of the stack. Everything is checked before
    anything is allocated.

    Args:
        model: with all parameters on the meta device, tied ones already tied.
        reader: the checkpoint.
        key_map: the names of the architecture.
        dtype: of the parameters.
        device: of the parameters and buffers, or a function of their names that gives it.
        keep_float32: whether the parameter of a name stays float32.
        may_be_absent: whether the checkpoint may lack the parameter of a name (a new head).
        ignore_mismatched: leave out tensors of the wrong shape; otherwise they are an error.
        progress: show a progress bar; None does so on a terminal.

    Returns:
        What was not loaded, and why.

    Raises:
        CheckpointError: a tensor is missing, unknown, there twice, or of the wrong shape or dtype.
    """
    device_of = device if callable(device) else lambda name: device
    plan = _plan(model, reader, key_map, may_be_absent, ignore_mismatched)
    if plan.problems:
        more = len(plan.problems) - _SHOWN
        listed = "; ".join(plan.problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{reader.directory}: does not fit {type(model).__name__}: {listed}")

    filled: dict[int, nn.Parameter] = {}

    def materialise(target: _Target) -> nn.Parameter:
        old = target.parameter
        if id(old) not in filled:
            final = torch.float32 if keep_float32(target.names[0]) else dtype
            data = torch.empty(old.shape, dtype=final, device=device_of(target.names[0]))
            filled[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
        return filled[id(old)]

    total = sum(reader.tensors[name].nbytes for name in plan.copies)
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with torch.no_grad(), tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=hidden) as bar:
        for shard in reader.shards():
            for name, tensor in shard:
                if name in plan.copies:
                    target, place = plan.copies[name]
                    place.view(materialise(target)).copy_(tensor)
                    bar.update(reader.tensors[name].nbytes)
    mismatched = [(target.names[0], found, expected) for target, found, expected in plan.mismatched.values()]
    for target in (*plan.absent, *(target for target, *_ in plan.mismatched.values())):
        materialise(target)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device_of(f"{prefix}.{name}" if prefix else name))
    return LoadReport([target.names[0] for target in plan.absent], mismatched, plan.ignored)


def _plan(
    model: nn.Module,
    reader: CheckpointReader | StateDictReader,
    key_map: KeyMap,
    may_be_absent: Callable[[str], bool],
    ignore_mismatched: bool,
) -> _LoadPlan:
    targets: dict[int, _Target] = {}
    by_name: dict[str, _Target] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        target = targets.setdefault(id(parameter), _Target(parameter))
        target.names.append(name)
        by_name[key_map.canonical(name)] = target

    plan = _LoadPlan()
    for name, info in reader.tensors.items():
        place = key_map.place(name)
        found = by_name.get(place.parameter)
        if found is not None:
            _add_source(plan, found, name, info, place, key_map)
        elif key_map.is_ignored(name):
            plan.ignored.append(name)
        else:
            plan.problems.append(f"{info.file.name}: unexpected tensor {name!r}")
    if ignore_mismatched:
        _leave_out_mismatched(plan)
    else:
        for name, (_, found_shape, expected) in plan.mismatched.items():
            where = f"{reader.tensors[name].file.name}: {name!r}"
            plan.problems.append(f"{where} must have shape {list(expected)}, got {list(found_shape)}")
        if plan.mismatched:
            plan.problems[-1] += " (ignore_mismatched_sizes=True initialises such weights anew)"
    left_out = [id(target) for target, *_ in plan.mismatched.values()]
    for target in targets.values():
        if id(target) in left_out:
            continue
        if not target.sources and any(may_be_absent(name) for name in target.names):
            plan.absent.append(target)
        else:
            plan.problems += (f"missing tensor {name!r}" for name in _missing(target, key_map))
    return plan


def _add_source(plan: _LoadPlan, target: _Target, name: str, info: TensorInfo, place: Place, key_map: KeyMap) -> None:
    where = f"{info.file.name}: {name!r}"
    shape = target.parameter.shape
    if place.expert is not None and place.expert >= shape[0]:
        plan.problems.append(f"{where} is of expert {place.expert}, expected {shape[0]} experts")
        return
    expected = tuple(place.view(target.parameter).shape)
    if info.shape != expected:
        plan.mismatched[name] = (target, info.shape, expected)
        return
    if info.dtype is None or not info.dtype.is_floating_point:
        plan.problems.append(f"{where} must be a floating-point tensor, got {info.dtype or 'an unsupported dtype'}")
        return

    other = target.sources.get((place.expert, place.part))
    if other is not None:
        order = [key_map.canonical(n) for n in target.names]
        mine, theirs = (order.index(key_map.place(n).parameter) for n in (name, other))
        if mine == theirs:
            plan.problems.append(f"{where} is the same tensor as {other!r}")
        if mine >= theirs:
            return
        # Tied weights may all be there; the first name counts.
        del plan.copies[other]
    elif target.sources and (place.expert is None) != ((None, 0) in target.sources):
        plan.problems.append(f"{where} is also part of {next(iter(target.sources.values()))!r}")
        return
    target.sources[place.expert, place.part] = name
    plan.copies[name] = (target, place)


def _leave_out_mismatched(plan: _LoadPlan) -> None:
    """Drop what else there is of a parameter of which some tensor has the wrong shape, and name it once."""
    once = {id(target): (name, entry) for name, entry in reversed(plan.mismatched.items()) if (target := entry[0])}
    plan.mismatched = dict(reversed(once.values()))
    plan.copies = {name: copy for name, copy in plan.copies.items() if id(copy[0]) not in once}


def _missing(target: _Target, key_map: KeyMap) -> Iterable[str]:
    """Names of the tensors that are needed to fill the parameter and not there."""
    if (None, 0) in target.sources:
        return
    prefix = target.names[0].removesuffix(key_map.canonical(target.names[0]))
    shape: torch.Size = target.parameter.shape
    for name, place in key_map.checkpoint_names(key_map.canonical(target.names[0]), tuple(shape)):
        if (place.expert, place.part) not in target.sources:
            yield prefix + name


def checkpoint_tensors(weights: nn.Module | Mapping[str, Tensor], key_map: KeyMap) -> list[tuple[str, Tensor]]:
    """A model's parameters as a checkpoint on the hub names and cuts them; views, nothing is copied.

    Args:
        weights: the model, of which tied parameters count once; or its parameters by name.
        key_map: the names of the architecture.
    """
    tensors = []
    named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    for name, parameter in named.items():
        canonical = key_map.canonical(name)
        prefix = name.removesuffix(canonical)
        for key, place in key_map.checkpoint_names(canonical, tuple(parameter.shape)):
            tensors.append((prefix + key, place.view(parameter.detach())))
    return tensors
