"""Writing a checkpoint directory so that an old one stays whole until the new one is."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX, SAFETENSORS_SHARD

#: Weight files of an older save, which a new one replaces even where their names differ.
OBSOLETE_WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, "model-*-of-*.safetensors")

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes from a number or a string such as "5GB" or "200MiB".

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f'size must be a positive number of bytes, or a string such as "5GB", got {size!r}')
    return int(float(match[1]) * _UNITS[match[2]])


@contextmanager
def replace_files(directory: str | os.PathLike[str], obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """Write files into the directory that this yields; when the block ends they take their place in `directory`.

    They are on disk before anything of the target changes. A new target appears by one rename. In an existing one,
    files of the same names and those that match the patterns in `obsolete` are set aside, and come back should
    anything fail; all others stay.

    Raises:
        CheckpointError: `directory` is a file.
    """
    target = Path(directory).absolute()
    exists = target.is_dir()
    if target.exists() and not exists:
        raise CheckpointError(f"{target}: is a file, expected a directory to save to")
    home = target if exists else target.parent
    home.mkdir(parents=True, exist_ok=True)
    stage = home / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    stage.mkdir()
    try:
        yield stage
        for path in stage.iterdir():
            _sync(path)
        _sync(stage)
        if exists:
            _exchange(stage, target, obsolete)
        else:
            os.rename(stage, target)
        _sync(home)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _exchange(stage: Path, target: Path, obsolete: Sequence[str]) -> None:
    new = sorted(path.name for path in stage.iterdir())
    old = {path.name for pattern in obsolete for path in target.glob(pattern)}
    aside = stage / "replaced"
    aside.mkdir()
    moved, placed = [], []
    try:
        for name in sorted(old.union(name for name in new if os.path.lexists(target / name))):
            os.rename(target / name, aside / name)
            moved.append(name)
        for name in new:
            os.rename(stage / name, target / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (target / name).unlink()
        for name in moved:
            os.rename(aside / name, target / name)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int | str = "5GB"
) -> list[str]:
    """Write tensors as safetensors, in shards with an index if they exceed `max_shard_size`.

    A tensor is never split; one larger than `max_shard_size` gets a shard of its own. One tensor at a time is brought
    to the host.

    Returns:
        The names of the files.

    Raises:
        ValueError: `max_shard_size` is no size, a name comes twice, or a dtype has no place in the format.
    """
    limit = parse_size(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    names = set()
    for name, tensor in tensors:
        if name in names:
            raise ValueError(f"write_weights: tensor {name!r} is given twice")
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"write_weights: tensor {name!r} has dtype {tensor.dtype}, which safetensors does not know"
            )
        names.add(name)
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes

    if len(shards) == 1:
        _write_safetensors(directory / SAFETENSORS, shards[0])
        return [SAFETENSORS]
    files = [SAFETENSORS_SHARD.format(shard=i + 1, total=len(shards)) for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_safetensors(directory / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (directory / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*files, SAFETENSORS_INDEX]


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The safetensors format: length of the header (8 bytes), header in JSON, then the data without gaps.

    The library's own function needs a copy of the whole file in memory; this needs one tensor.
    """
    # Wide elements first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
