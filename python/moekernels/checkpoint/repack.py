"""A checkpoint written anew for reading expert by expert: each lies in one piece, at blocks of the file system."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from moekernels._files import write_file
from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.files import read_json
from moekernels.checkpoint.hub import CONFIG_FILES, GENERATION_CONFIG_FILES, TOKENIZER_FILES
from moekernels.checkpoint.keymap import KEY_MAPS, KeyMap
from moekernels.checkpoint.packed import BLOCK, Group, TensorHeader, packed_size, write_packed
from moekernels.checkpoint.reader import CheckpointReader, open_shard
from moekernels.checkpoint.saving import replace_files
from moekernels.checkpoint.writer import OBSOLETE_WEIGHTS, parse_size

#: Beside the weights; licences and model cards go with them.
_OTHER_FILES = (*CONFIG_FILES, *GENERATION_CONFIG_FILES, *TOKENIZER_FILES, "LICENSE*", "README*")


class _Part(NamedTuple):
    """A tensor of the new checkpoint, and where it comes from.

    Attributes:
        header: of the new one.
        source: its name in the old checkpoint.
        cut: takes it out of the old tensor.
    """

    header: TensorHeader
    source: str
    cut: Callable[[Tensor], Tensor]


def repack(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> None:
    """Write the checkpoint in a directory to another one, for `expert_memory`.

    The names are those of the hub, so that every reader of such checkpoints reads it; a stack of experts becomes one
    tensor for each. What is in memory at a time is one expert, or one other tensor. Nothing is in the place of
    `output` before all is on the disk.

    Args:
        directory: safetensors or pickles, in any number of files.
        output: another directory.
        dtype: of all weights; by default each keeps its own.
        max_shard_size: bytes of a file, or a string such as "5GB".
        progress: show a progress bar; None does so on a terminal.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the disk has too little room; the message says how much.
        ValueError: `output` is the same directory, a size is none, or `dtype` is given for quantised weights.
        OSError: a file cannot be written. Nothing has changed then.
    """
    source, target = Path(directory), Path(output)
    limit = parse_size(max_shard_size)
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ValueError(f"repack: the output must be another directory than the checkpoint's, got {target} for both")
    config = read_json(source / CONFIG_FILES[0])
    key_map = KEY_MAPS.get(str(config.get("model_type")))
    if key_map is None:
        raise CheckpointError(
            f"{source / CONFIG_FILES[0]}: model_type must be one of {', '.join(KEY_MAPS)}, "
            f"got {config.get('model_type')!r}"
        )
    if dtype is not None and config.get("quantization_config"):
        raise ValueError(f"repack: the weights of {source} are quantised, and cannot be converted to {dtype}")
    reader = CheckpointReader(source)
    groups = _groups(reader, key_map, dtype)
    _check_room(target, packed_size(groups))
    total = sum(group.nbytes for group in groups)
    hidden = None if progress is None else not progress
    with (
        replace_files(target, OBSOLETE_WEIGHTS) as stage,
        tqdm(total=total, desc="Repacking", unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        for path in _other_files(source):
            (stage / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / path, stage / path)
        if dtype is not None:
            _set_dtype(stage / CONFIG_FILES[0], config, dtype)
        write_packed(stage, groups, limit, bar.update)


def _groups(reader: CheckpointReader, key_map: KeyMap, dtype: torch.dtype | None) -> list[Group]:
    """What is not of an expert, each for itself, and then expert by expert; last what would move all that follows it
    off the blocks of a file system."""
    dense: list[_Part] = []
    experts: dict[tuple[str, int], list[_Part]] = {}
    for name, info in reader.tensors.items():
        if info.dtype is None:
            raise CheckpointError(f"{info.file}: {name!r} has a dtype that cannot be written")
        final = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        place = key_map.place(name)
        canonical = key_map.canonical(name)
        prefix = name.removesuffix(canonical)
        if place.expert is not None:
            part = _Part(TensorHeader(name, info.shape, final), name, lambda tensor: tensor)
            experts.setdefault((_layer(place.parameter), place.expert), []).append(part)
            continue
        pieces = list(key_map.checkpoint_names(place.parameter, info.shape)) if info.shape else []
        if len(pieces) <= 1:
            dense.append(_Part(TensorHeader(name, info.shape, final), name, lambda tensor: tensor))
            continue
        for key, piece in pieces:  # a stack of all experts
            assert piece.expert is not None
            shape = tuple(piece.view(torch.empty(info.shape, device="meta")).shape)
            part = _Part(TensorHeader(prefix + key, shape, final), name, piece.view)
            experts.setdefault((_layer(place.parameter), piece.expert), []).append(part)

    def group(parts: list[_Part]) -> Group:
        # Matrices first: what is not a whole number of blocks, a bias of a small model, comes last.
        parts = sorted(parts, key=lambda part: (-len(part.header.shape), part.header.nbytes % BLOCK != 0))
        return Group(tuple(part.header for part in parts), lambda: _read(reader, parts))

    # Layers in their order: numbers in names count as numbers.
    ordered = sorted(experts, key=lambda key: (_natural(key[0]), key[1]))
    whole = [group([part]) for part in dense if part.header.nbytes % BLOCK == 0]
    rest = [group([part]) for part in dense if part.header.nbytes % BLOCK]
    return [*whole, *(group(experts[key]) for key in ordered), *rest]


def _read(reader: CheckpointReader, parts: list[_Part]) -> Iterator[Tensor]:
    with ExitStack() as stack:
        shards: dict[Path, Callable[[str], Tensor]] = {}
        for part in parts:
            file = reader.tensors[part.source].file
            if file not in shards:
                shards[file] = stack.enter_context(open_shard(file))[1]
            yield part.cut(shards[file](part.source)).to(part.header.dtype)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def _other_files(source: Path) -> Iterator[Path]:
    found = {path for pattern in _OTHER_FILES for path in source.glob(pattern) if path.is_file()}
    return (path.relative_to(source) for path in sorted(found))


def _set_dtype(path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Old and new name of the field are both read by somebody."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    write_file(path, json.dumps({**config, name: str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n")


def _check_room(target: Path, needed: int) -> None:
    home = target.absolute()
    while not home.exists():
        home = home.parent
    free = shutil.disk_usage(home).free
    if needed > free:
        raise CheckpointError(
            f"{target}: needs {needed / 1e9:.2f} GB, and {home} has {free / 1e9:.2f} GB free: "
            f"{(needed - free) / 1e9:.2f} GB are missing"
        )
