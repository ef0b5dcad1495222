from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moekernels.checkpoint import OBSOLETE_WEIGHTS, CheckpointError, CheckpointReader, replace_files, write_weights
from moekernels.checkpoint.writer import parse_size

INDEX = "model.safetensors.index.json"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    dtypes = (
        torch.uint8,
        torch.bool,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.int32,
        torch.int64,
        torch.float64,
    )
    tensors = {f"{dtype}": (torch.randn(3, 5) * 3).to(dtype) for dtype in dtypes}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 7)
    tensors["transposed"] = torch.randn(4, 6).T
    tensors["slice"] = torch.randn(8, 8)[2:5, 1::2]
    tensors["Ünïcode"] = torch.randn(2, requires_grad=True)
    assert write_weights(tmp_path, tensors.items()) == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)}  # 100 bytes each
    tensors["big"] = torch.zeros(200)
    files = write_weights(tmp_path, tensors.items(), max_shard_size=250)
    assert files[-1] == INDEX and len(files) == 6
    assert files[0] == "model-00001-of-00005.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 100 + 800
    assert index["weight_map"]["t1"] == files[0] and index["weight_map"]["t2"] == files[1]
    read = {name: t.clone() for shard in CheckpointReader(tmp_path).shards() for name, t in shard}
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor 'a' is given twice"):
        write_weights(tmp_path, [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(ValueError, match=r"tensor 'a' has dtype torch\.complex64"):
        write_weights(tmp_path, [("a", torch.ones(1, dtype=torch.complex64))])
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2kib", 2048), ("1GiB", 2**30), ("10TB", 10**13)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1", 0, "five"])
def test_no_sizes(size: int | str) -> None:
    with pytest.raises(ValueError, match="size must be a positive number of bytes"):
        parse_size(size)


def write(stage: Path, value: float, max_shard_size: int = 10**9) -> None:
    tensors: list[tuple[str, Tensor]] = [(f"t{i}", torch.full((25,), value)) for i in range(4)]
    write_weights(stage, tensors, max_shard_size)
    (stage / "config.json").write_text(json.dumps({"value": value}))


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replace_files(target) as stage:
        write(stage, 1.0)
        assert not target.exists()
    assert sorted(contents(target)) == ["config.json", "model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    # As any directory made here: not private, as temporary ones are.
    (tmp_path / "ordinary").mkdir()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_old_weights_go_and_other_files_stay(tmp_path: Path) -> None:
    with replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage:
        write(stage, 1.0, max_shard_size=200)
    assert "model-00002-of-00002.safetensors" in contents(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage:
        write(stage, 2.0)
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "model.safetensors")["t3"][0] == 2.0


@pytest.mark.parametrize("exists", [False, True])
def test_failing_while_writing(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "checkpoint"
    if exists:
        with replace_files(target) as stage:
            write(stage, 1.0)
    before = contents(target) if exists else None
    with pytest.raises(RuntimeError, match="disk full"), replace_files(target, OBSOLETE_WEIGHTS) as stage:
        write(stage, 2.0)
        raise RuntimeError("disk full")
    if exists:
        assert contents(target) == before
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", range(6))
def test_failing_while_files_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    with replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage:
        write(stage, 1.0, max_shard_size=200)
    before = contents(tmp_path)
    rename, calls = os.rename, []

    def flaky(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == fails_at + 1:
            raise OSError("no such luck")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(OSError, match="no such luck"), replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage:
        write(stage, 2.0)
    assert contents(tmp_path) == before


def test_saving_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="file: is a file, expected a directory"),
        replace_files(tmp_path / "file"),
    ):
        pass
