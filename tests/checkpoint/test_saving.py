from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moekernels.checkpoint import OBSOLETE_WEIGHTS, CheckpointError, CheckpointReader, replace_files, write_weights
from moekernels.checkpoint.saving import finish_saves


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(stage: Path, value: float, max_shard_size: int = 10**9, beside: Path | None = None) -> None:
    tensors: list[tuple[str, Tensor]] = [(f"t{i}", torch.full((25,), value)) for i in range(4)]
    write_weights(stage, tensors, max_shard_size, beside=beside)
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


def save_killed(directory: Path, after: int, max_shard_size: int) -> bool:
    """Another process saves, and ends at its n-th change of the directory, as if it were killed there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are threads; the child needs none of them
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *args: Any, **options: Any) -> None:
            nonlocal after
            after -= 1
            if after < 0:
                os._exit(9)
            change(path, *args, **options)

        return call

    try:
        os.rename, os.unlink, os.rmdir = map(counted, (os.rename, os.unlink, os.rmdir))
        with replace_files(directory, OBSOLETE_WEIGHTS) as stage:
            write(stage, 2.0, max_shard_size, beside=directory)
        os._exit(0)
    finally:
        os._exit(1)


def read(directory: Path) -> float:
    """The value that all of it has."""
    tensors = [t.clone() for shard in CheckpointReader(directory).shards() for _, t in shard]
    values = {float(value) for tensor in tensors for value in tensor}
    assert len(tensors) == 4 and len(values) == 1, values
    return values.pop()


@pytest.mark.parametrize(("before", "after"), [(200, 200), (200, 10**9), (10**9, 200), (10**9, 10**9)])
def test_killed_while_files_change_places(tmp_path: Path, before: int, after: int) -> None:
    """Weights are whole at every moment, for any reader; and with the configuration once the save is completed."""
    seen = []
    for changes in range(100):
        target = tmp_path / str(changes)
        with replace_files(target) as stage:
            write(stage, 1.0, before)
        (target / "tokenizer.json").write_text("{}")
        killed = save_killed(target, changes, after)
        read(target)
        finish_saves(target)
        seen.append(read(target))
        assert json.loads((target / "config.json").read_text()) == {"value": seen[-1]}
        assert (target / "tokenizer.json").exists() and not list(target.glob(".*.saved"))
        if not killed:
            break
        with replace_files(target) as stage:
            pass
        assert not list(target.glob(".*")), "nothing is left over after another save"
    assert seen[0] == 1.0 and seen[-1] == 2.0 and seen == sorted(seen) and len(seen) > 4


def test_failing_while_files_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage:
        write(stage, 1.0, max_shard_size=200)
    rename = os.rename

    def flaky(source: Any, destination: Any) -> None:
        if Path(destination).name == "config.json":
            raise OSError("no such luck")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with (
        pytest.raises(CheckpointError, match="interrupted, and cannot be completed: no such luck"),
        replace_files(tmp_path, OBSOLETE_WEIGHTS) as stage,
    ):
        write(stage, 2.0)
    monkeypatch.undo()
    finish_saves(tmp_path)
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors"] and read(tmp_path) == 2.0


def test_a_directory_that_another_process_made_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with replace_files(target) as stage:
        write(stage, 2.0)
        target.mkdir()
        (target / "tokenizer.json").write_text("{}")
    assert sorted(contents(target)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_save_in_progress_is_not_abandoned(tmp_path: Path) -> None:
    with replace_files(tmp_path) as outer:
        (outer / "a").write_text("a")
        with replace_files(tmp_path) as inner:
            (inner / "b").write_text("b")
    assert sorted(contents(tmp_path)) == ["a", "b"]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    """As in the hub's cache, where they lead to files that several revisions share."""
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "blob")
    with replace_files(tmp_path / "snapshot") as stage:
        (stage / "config.json").write_text("own")
    assert (tmp_path / "blob").read_text() == "shared"
    assert (tmp_path / "snapshot" / "config.json").read_text() == "own"


def test_saving_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="file: is a file, expected a directory"),
        replace_files(tmp_path / "file"),
    ):
        pass
