"""File names of a checkpoint directory, and how its JSON files are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moekernels.checkpoint.errors import CheckpointError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SHARD = "model-{shard:05d}-of-{total:05d}.safetensors"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def with_variant(name: str, variant: str | None) -> str:
    """The name of a file in a variant: ``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``."""
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it does not hold a JSON object; the message says
            where it is wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: not UTF-8 at byte {error.start}: {error.reason}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: not usable JSON: objects and lists are nested too deeply") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def checked_shard(directory: Path, name: object, index: Path) -> Path:
    """The file an index names, which must lie in the checkpoint directory.

    A link may lead to a file of the directory, or into the blob store that the hub's local cache keeps beside its
    snapshots; anything else could make a downloaded checkpoint read files of this machine.

    Raises:
        CheckpointError: the name leads elsewhere, or to nothing.
    """
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", "..") or Path(name).name != name:
        raise CheckpointError(f"{index}: names the file {name!r}, expected a plain file name in {directory}")
    path = directory / name
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    target = Path(os.path.realpath(path))  # Path.resolve raises at a link to itself
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{index}: names the file {name!r}, which links to {target}, outside of {directory}")
    if not target.is_file():
        raise CheckpointError(f"{index}: names the file {name!r}, which is missing from {directory}")
    return path
