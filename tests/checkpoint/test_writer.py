from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moekernels.checkpoint import CheckpointReader, write_weights
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
    # As any file made here: others may read it.
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


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


def test_shards_take_no_name_that_is_taken(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(4)}
    (tmp_path / "stage").mkdir()
    first = write_weights(tmp_path, tensors.items(), max_shard_size=200)
    second = write_weights(tmp_path / "stage", tensors.items(), max_shard_size=200, beside=tmp_path)
    assert set(first) & set(second) == {INDEX} and len(first) == len(second) == 3
    assert all(re.fullmatch(r"model-[0-9a-f]{8}-0000\d-of-00002\.safetensors", name) for name in second[:-1])
    read = {name: t.clone() for shard in CheckpointReader(tmp_path / "stage").shards() for name, t in shard}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_what_belongs_together(tmp_path: Path) -> None:
    """Tensors of one weight get one shard, also where that is too large then."""
    tensors = [
        (f"{weight}.{part}", torch.full((100,), i, dtype=torch.float32))
        for i, weight in enumerate("abc")
        for part in "xyz"
    ]
    write_weights(tmp_path, tensors, 1000, together=lambda name: name.partition(".")[0])
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    assert all(len({weight_map[f"{weight}.{part}"] for part in "xyz"}) == 1 for weight in "abc")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {*weight_map.values(), "model.safetensors.index.json"}
    )
