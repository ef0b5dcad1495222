from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.checkpoint import CheckpointError, CheckpointReader, read_json
from tests.checkpoint.conftest import FORMATS, write_pickle, write_sharded, write_single

INDEX = "model.safetensors.index.json"


def edit_index(directory: Path, edit: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index)
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("layout", FORMATS)
def test_inventory_and_data(tmp_path: Path, tensors: dict[str, Tensor], layout: str) -> None:
    FORMATS[layout](tmp_path, tensors)
    reader = CheckpointReader(tmp_path)
    assert reader.tensors.keys() == tensors.keys()
    for name, info in reader.tensors.items():
        assert info.shape == tuple(tensors[name].shape)
        assert info.dtype == torch.float32 and info.nbytes == tensors[name].nbytes
        assert info.file in reader.files
    read = {name: tensor.clone() for shard in reader.shards() for name, tensor in shard}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_order_of_preference(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_pickle(tmp_path, {"only": torch.ones(1)})
    write_single(tmp_path, tensors)
    assert CheckpointReader(tmp_path).tensors.keys() == tensors.keys()
    assert CheckpointReader(tmp_path, use_safetensors=False).tensors.keys() == {"only"}
    (tmp_path / "model.safetensors").unlink()
    assert CheckpointReader(tmp_path).tensors.keys() == {"only"}
    with pytest.raises(CheckpointError, match=r"holds no weights, expected one of model\.safetensors, model\.safe"):
        CheckpointReader(tmp_path, use_safetensors=True)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\0", "\ud800", 3, None, ["a"]]
)
def test_index_that_names_another_directory(tmp_path: Path, tensors: dict[str, Tensor], name: object) -> None:
    home = tmp_path / "checkpoint"
    home.mkdir()
    write_sharded(home, tensors)
    write_single(tmp_path, tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    edit_index(home, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"index\.json: names the file .*, expected a plain file name in"):
        CheckpointReader(home)


def test_index_that_names_a_link_out_of_the_directory(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    home = tmp_path / "checkpoint"
    home.mkdir()
    write_sharded(home, tensors)
    shard = home / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"links to .*elsewhere\.safetensors, outside of"):
        CheckpointReader(home)
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match=r"'model-00002-of-00002.safetensors', which is missing from"):
        CheckpointReader(home)
    shard.unlink()
    (tmp_path / "elsewhere.safetensors").rename(home / "blob")
    shard.symlink_to("blob")
    assert CheckpointReader(home).tensors.keys() == tensors.keys()


def test_the_layout_of_the_hub_cache(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    home, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    write_sharded(blobs, tensors)
    for path in list(blobs.iterdir()):
        (home / path.name).symlink_to(os.path.relpath(path, home))
    assert CheckpointReader(home).tensors.keys() == tensors.keys()


def test_missing_shard(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the file 'model-00002-of-00002\.safetensors', which is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x80"])
def test_broken_index(tmp_path: Path, tensors: dict[str, Tensor], text: str) -> None:
    write_sharded(tmp_path, tensors)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        CheckpointError, match=r"index\.json: (not valid JSON|must hold a JSON object|weight_map must be)"
    ):
        CheckpointReader(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    edit_index(tmp_path, lambda index: index["weight_map"].update(extra="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"'extra' should be in model-00001-of-00002.safetensors, but is nowhere"):
        CheckpointReader(tmp_path)
    write_sharded(tmp_path, tensors)
    edit_index(
        tmp_path, lambda index: index["weight_map"].update({"lm_head.weight": "model-00001-of-00002.safetensors"})
    )
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' should be in model-00001.*, but is in model-00002"):
        CheckpointReader(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    write_sharded(tmp_path, tensors)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002.*: holds '.*', as does model-00001"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "sharded-safetensors", "pickle", "old-pickle"])
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(tmp_path: Path, tensors: dict[str, Tensor], layout: str, keep: int) -> None:
    FORMATS[layout](tmp_path, tensors)
    path = next(p for p in sorted(tmp_path.iterdir()) if p.suffix in (".safetensors", ".bin"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{path.name}: .*(truncated|holds more than tensors)"):
        CheckpointReader(tmp_path)


class Exploit:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, old: bool) -> None:
    trap = tmp_path / "trap"
    torch.save(
        {"lm_head.weight": Exploit(trap)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old
    )
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle that holds more than tensors"):
        CheckpointReader(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must hold a dictionary of tensors, got list"),
        ({"a": 1}, "must hold only tensors, got int under 'a'"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_json_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(CheckpointError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")
