"""Bringing a checkpoint's tensors into a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.keymap import KeyMap, Place
from moekernels.checkpoint.packing import empty, fill, fitting
from moekernels.checkpoint.reader import Reader, TensorInfo
from moekernels.quantization import Format, QuantizedWeight

_SHOWN = 8  # problems that an error lists before it only counts them


@dataclass(eq=False)
class _Target:
    """One parameter under all the names it has, the preferred one first."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    #: What of it -> name in the checkpoint.
    sources: dict[Place, str] = field(default_factory=dict)
    #: What it is held in, if it is to be quantised.
    format: Format | None = None


@dataclass
class _LoadPlan:
    """What goes where, and what is wrong with it."""

    copies: dict[str, tuple[_Target, Place]] = field(default_factory=dict)
    absent: list[_Target] = field(default_factory=list)
    left_out: list[_Target] = field(default_factory=list)
    #: Name in the checkpoint -> target, shape in the checkpoint, and the shape it must have.
    mismatched: dict[str, tuple[_Target, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Packing(NamedTuple):
    """Which parameters are quantised.

    Attributes:
        format: that in which the parameter of a name is to be held, if the checkpoint has it whole; None is whole.
        is_packable: whether the parameter of a name can be held in the format in which the checkpoint has it.
        compute_dtype: what products with quantised weights are computed in; None is the dtype of the other parameters.
    """

    format: Callable[[str], Format | None] = lambda name: None
    is_packable: Callable[[str, Format], bool] = lambda name, format: False
    compute_dtype: torch.dtype | None = None


class LoadReport(NamedTuple):
    """What was not as it could be.

    Attributes:
        absent: parameters that the checkpoint lacks; they are allocated but not initialised.
        mismatched: parameters the checkpoint has in another shape, that shape and theirs; not initialised either.
        ignored: tensors of the checkpoint that the model has no use for.
        left_out: parameters that were to be left out, and what the checkpoint has of them: (expert, part) -> name,
            where (None, 0) is the whole parameter.
    """

    absent: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    ignored: list[str]
    left_out: dict[str, dict[tuple[int | None, int], str]]

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
    reader: Reader,
    key_map: KeyMap,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
    keep_float32: Callable[[str], bool] = lambda name: False,
    may_be_absent: Callable[[str], bool] = lambda name: False,
    left_out: Callable[[str], bool] = lambda name: False,
    ignore_mismatched: bool = False,
    packing: Packing = Packing(),  # noqa: B008
    held: Mapping[str, range] | None = None,
    progress: bool | None = None,
) -> LoadReport:
    """Fill a model that was built on the meta device.

    Every parameter is allocated once, in its final dtype or format on its final device, and every tensor of the
    checkpoint is copied (or quantised) once, straight to its place; one expert's tensor into its slice of the stack.
    Everything is checked before anything is allocated.

    Args:
        model: with all parameters on the meta device, tied ones already tied.
        reader: the checkpoint.
        key_map: the names of the architecture.
        dtype: of the parameters.
        device: of the parameters and buffers, or a function of their names that gives it.
        keep_float32: whether the parameter of a name stays float32.
        may_be_absent: whether the checkpoint may lack the parameter of a name (a new head).
        left_out: whether the parameter of a name stays on the meta device; the checkpoint must fit it all the same.
        ignore_mismatched: leave out tensors of the wrong shape; otherwise they are an error.
        packing: which parameters are quantised.
        held: of stacks by their names in the model, the experts that are wanted; the others are not read, and the
            parameter has no place for them.
        progress: show a progress bar; None does so on a terminal.

    Returns:
        What was not loaded, and why.

    Raises:
        CheckpointError: a tensor is missing, unknown, there twice, or of the wrong shape or dtype.
        ValueError: the shape of a parameter is none that its format can have.
    """
    device_of = device if callable(device) else lambda name: device
    plan = _plan(model, reader, key_map, may_be_absent, left_out, ignore_mismatched)
    if plan.problems:
        more = len(plan.problems) - _SHOWN
        listed = "; ".join(plan.problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{reader.directory}: does not fit {type(model).__name__}: {listed}")
    for target in dict.fromkeys(target for target, _ in plan.copies.values()):
        target.format = _format_of(target, reader, packing)

    filled: dict[int, nn.Parameter] = {}
    wanted = held or {}
    stacks = [target for target, _ in plan.copies.values() if target.names[0] in wanted]
    plan.copies = {name: copy for name, copy in plan.copies.items() if _is_held(*copy, wanted)}

    def materialise(target: _Target) -> nn.Parameter:
        old = target.parameter
        if id(old) not in filled:
            final = torch.float32 if keep_float32(target.names[0]) else dtype
            experts = wanted.get(target.names[0])
            shape = old.shape if experts is None else (len(experts), *old.shape[1:])
            where = device_of(target.names[0])
            if target.format is not None:
                packed = empty(target.format, tuple(shape), packing.compute_dtype or final, torch.device(where))
                filled[id(old)] = nn.Parameter(packed, requires_grad=False)
            else:
                data = torch.empty(shape, dtype=final, device=where)
                filled[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
        return filled[id(old)]

    total = sum(reader.tensors[name].nbytes for name in plan.copies)
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with torch.no_grad(), tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=hidden) as bar:
        for shard in reader.shards(plan.copies):
            for name, tensor in shard:
                target, place = plan.copies[name]
                _copy(tensor, materialise(target), place, wanted.get(target.names[0]))
                bar.update(reader.tensors[name].nbytes)
    mismatched = [(target.names[0], found, expected) for target, found, expected in plan.mismatched.values()]
    for target in (*plan.absent, *(target for target, *_ in plan.mismatched.values()), *stacks):
        materialise(target)
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled.get(id(parameter), parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device_of(f"{prefix}.{name}" if prefix else name))
    return LoadReport(
        [target.names[0] for target in plan.absent],
        mismatched,
        plan.ignored,
        {
            target.names[0]: {(place.expert, place.part): name for place, name in target.sources.items()}
            for target in plan.left_out
        },
    )


def _is_held(target: _Target, place: Place, held: Mapping[str, range]) -> bool:
    experts = held.get(target.names[0])
    return experts is None or place.expert is None or place.expert in experts


def _copy(tensor: Tensor, parameter: Tensor, place: Place, held: range | None) -> None:
    """The checkpoint's tensor to its place in a parameter that has the experts `held`, or all of them."""
    if held is not None and place.expert is None:
        tensor = tensor[held.start : held.stop]
    elif held is not None:
        assert place.expert is not None
        place = place._replace(expert=place.expert - held.start)
    if isinstance(parameter, QuantizedWeight):
        fill(parameter, place, tensor)
        return
    whole = tensor.dequantize(parameter.dtype) if isinstance(tensor, QuantizedWeight) else tensor
    place.view(parameter).copy_(whole)


def _plan(
    model: nn.Module,
    reader: Reader,
    key_map: KeyMap,
    may_be_absent: Callable[[str], bool],
    left_out: Callable[[str], bool],
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
    mismatched = [id(target) for target, *_ in plan.mismatched.values()]
    for target in targets.values():
        if id(target) in mismatched:
            continue
        if not target.sources and any(may_be_absent(name) for name in target.names):
            plan.absent.append(target)
        else:
            plan.problems += (f"missing tensor {name!r}" for name in _missing(target, key_map))
        if left_out(target.names[0]):
            plan.left_out.append(target)
    without = {id(target) for target in plan.left_out}
    plan.copies = {name: copy for name, copy in plan.copies.items() if id(copy[0]) not in without}
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
    if not info.is_weight:
        plan.problems.append(f"{where} must be a floating-point tensor, got {info.dtype or 'an unsupported dtype'}")
        return

    mine_of = place._replace(parameter="")
    other = target.sources.get(mine_of)
    if other is not None:
        order = [key_map.canonical(n) for n in target.names]
        mine, theirs = (order.index(key_map.place(n).parameter) for n in (name, other))
        if mine == theirs:
            plan.problems.append(f"{where} is the same tensor as {other!r}")
        if mine >= theirs:
            return
        # Tied weights may all be there; the first name counts.
        del plan.copies[other]
    elif target.sources and _cut(place) != _cut(next(iter(target.sources))):
        plan.problems.append(f"{where} is also part of {next(iter(target.sources.values()))!r}")
        return
    target.sources[mine_of] = name
    plan.copies[name] = (target, place)


def _cut(place: Place) -> tuple[bool, int]:
    """How a parameter is cut into tensors: by experts, and into how many parts."""
    return place.expert is None, place.parts


def _format_of(target: _Target, reader: Reader, packing: Packing) -> Format | None:
    """What a parameter that the checkpoint has is held in; None is whole."""
    name, shape = target.names[0], tuple(target.parameter.shape)
    stored = [reader.tensors[source].format for source in target.sources.values()]
    parts = next(iter(target.sources)).parts
    if not any(stored):
        format = packing.format(name)
        if format is None:
            return None
        format.check_shape(shape, f"from_pretrained: {name}")
        if (found := fitting(format, shape, parts)) is None:
            raise ValueError(
                f"from_pretrained: {name} of shape {list(shape)} is read in {parts} parts, which would share a block "
                f"of {format}"
            )
        return found
    format = stored[0]
    if format is not None and not packing.is_packable(name, format):
        return None
    found = fitting(format, shape, parts) if format is not None and len(set(stored)) == 1 else None
    if found is None:
        kinds = ", ".join(sorted({"whole" if kind is None else kind.name for kind in stored}))
        warnings.warn(
            f"{name}: the checkpoint holds its parts differently ({kinds}), so that it is held whole", stacklevel=2
        )
    return found


def _leave_out_mismatched(plan: _LoadPlan) -> None:
    """Drop what else there is of a parameter of which some tensor has the wrong shape, and name it once."""
    once = {id(target): (name, entry) for name, entry in reversed(plan.mismatched.items()) if (target := entry[0])}
    plan.mismatched = dict(reversed(once.values()))
    plan.copies = {name: copy for name, copy in plan.copies.items() if id(copy[0]) not in once}


def _missing(target: _Target, key_map: KeyMap) -> Iterable[str]:
    """Names of the tensors that are needed to fill the parameter and not there."""
    if any(_cut(place) == (True, 1) for place in target.sources):
        return
    prefix = target.names[0].removesuffix(key_map.canonical(target.names[0]))
    shape: torch.Size = target.parameter.shape
    for name, place in key_map.checkpoint_names(key_map.canonical(target.names[0]), tuple(shape)):
        if place._replace(parameter="") not in target.sources:
            yield prefix + name


def checkpoint_tensors(
    weights: nn.Module | Mapping[str, Tensor], key_map: KeyMap, first_expert: int = 0
) -> list[tuple[str, Tensor]]:
    """A model's parameters as a checkpoint on the hub names and cuts them; views, nothing is copied.

    Args:
        weights: the model, of which tied parameters count once; or its parameters by name.
        key_map: the names of the architecture.
        first_expert: which expert the first one of stacks is.
    """
    tensors = []
    named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    for name, parameter in named.items():
        canonical = key_map.canonical(name)
        prefix = name.removesuffix(canonical)
        for key, place in key_map.checkpoint_names(canonical, tuple(parameter.shape), first_expert):
            tensors.append((prefix + key, place.view(parameter.detach())))
    return tensors
