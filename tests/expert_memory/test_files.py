"""Files that are read in parts, and what can happen to them meanwhile."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.expert_memory import ExpertReadError, files
from tests.expert_memory.conftest import EXPERT, load
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
INPUTS = tiny.inputs("olmoe")


@pytest.fixture
def directory(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(saved("olmoe"), tmp_path / "model"))


@pytest.fixture
def streamed(directory: Path) -> Any:
    return load("olmoe", directory, expert_memory=EXPERT)


@pytest.fixture
def expected(saved: Callable[..., Path]) -> torch.Tensor:
    logits: torch.Tensor = load("olmoe", saved("olmoe"))(**INPUTS).logits
    return logits


def test_reads_that_are_interrupted_or_end_early(
    streamed: Any, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = os.preadv, 0

    def now_and_then(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")
        return min(whole(descriptor, buffers, offset), 100 if calls % 3 == 1 else 5000)

    monkeypatch.setattr(os, "preadv", now_and_then)
    assert torch.equal(streamed(**INPUTS).logits, expected)
    assert calls > 50


def test_without_direct_reads(directory: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refused(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such reads here")
        return plain(path, flags, *args)

    monkeypatch.setattr(os, "open", refused)
    streamed = load("olmoe", directory, expert_memory=EXPERT)
    assert not any(file.is_direct for file in streamed.expert_cache._files.values())
    assert torch.equal(streamed(**INPUTS).logits, expected)


def shards_with_experts(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.safetensors") if b"experts" in path.read_bytes()[:4096]]


@pytest.mark.parametrize("harm", ["cut", "written"])
def test_files_that_change(harm: str, streamed: Any, directory: Path, expected: torch.Tensor) -> None:
    """An error names expert and file; other models go on, and so does this one once the files are as they were."""
    other = load(
        "olmoe", directory.parent / shutil.copytree(directory, directory.parent / "other"), expert_memory=EXPERT
    )
    broken = shards_with_experts(directory)
    times = {path: path.stat() for path in broken}
    whole = {path: path.read_bytes() for path in broken}
    for path in broken:
        path.write_bytes(whole[path][:-2000] if harm == "cut" else whole[path])
        if harm == "written":
            os.utime(path, ns=(0, 1))
    how = r"it had \d+ bytes, and has \d+" if harm == "cut" else "it was written to"
    message = rf"expert \d of model\.layers\.0\.mlp\.experts: .*/model/model-\d+-of-\d+\.safetensors: changed .*: {how}"
    for _ in range(2):
        with pytest.raises(ExpertReadError, match=message):
            streamed(**INPUTS)
    assert torch.equal(other(**INPUTS).logits, expected)
    for path in broken:
        path.write_bytes(whole[path])
        os.utime(path, ns=(times[path].st_atime_ns, times[path].st_mtime_ns))
    assert torch.equal(streamed(**INPUTS).logits, expected)
    assert streamed.expert_cache.stats().bytes_in_memory <= EXPERT


def test_files_that_are_removed_or_replaced(streamed: Any, directory: Path, expected: torch.Tensor) -> None:
    """The model has them open: it goes on with the weights it was loaded with."""
    for i, path in enumerate(sorted(directory.glob("*.safetensors"))):
        path.unlink()
        if i % 2:
            path.write_bytes(b"another")
    assert torch.equal(streamed(**INPUTS).logits, expected)


def test_a_disk_that_fails(streamed: Any, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fails)
        with pytest.raises(ExpertReadError, match=r"expert \d of .*\.safetensors: cannot be read: Input/output error"):
            streamed(**INPUTS)
    assert torch.equal(streamed(**INPUTS).logits, expected)


def test_a_read_that_never_ends(streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    monkeypatch.setattr(files, "_MAX_REPEATS", 3)
    with pytest.raises(ExpertReadError, match=r"bytes \d+ to \d+ cannot be read: only 0 arrive"):
        streamed(**INPUTS)


def test_files_that_cannot_be_opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path) -> tuple[int, bool]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "_open", refuses)
    with pytest.raises(ExpertReadError, match=r"\.safetensors: cannot be opened: Permission denied"):
        load("olmoe", directory, expert_memory=EXPERT)


def test_descriptors_are_closed(directory: Path) -> None:
    def is_open() -> bool:
        links = (path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return any(link.is_relative_to(directory) for link in links)

    streamed = load("olmoe", directory, expert_memory=EXPERT)
    streamed(**INPUTS)
    assert is_open()
    del streamed
    for _ in range(100):  # a thread that reads may only just be through
        gc.collect()
        if not is_open():
            break
        time.sleep(0.05)
    assert not is_open()
