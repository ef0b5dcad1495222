"""Disks that are full, files that must not be read, directories that go away."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moekernels._files import write_file
from moekernels.checkpoint import CheckpointError
from moekernels.models import AutoModelForCausalLM, OlmoeForCausalLM
from moekernels.tokenizers import AutoTokenizer
from tests.models import tiny
from tests.tokenizers.sentencepiece_builders import nllb


def model(value: float, layers: int = 3) -> OlmoeForCausalLM:
    config = type(tiny.CONFIGS["olmoe"]).from_dict({**tiny.CONFIGS["olmoe"].to_dict(), "num_hidden_layers": layers})
    made = OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_a_full_disk_while_saving(small_disk: Path, shards: str) -> None:
    target = small_disk / "model"
    model(1.0).save_pretrained(target, max_shard_size=shards)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    large = model(2.0, layers=12)
    for directory in (target, small_disk / "other"):
        with pytest.raises(Exception, match="No space left on device"):
            large.save_pretrained(directory, max_shard_size=shards)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(os.listdir(small_disk)) == ["model"]
    assert bool((AutoModelForCausalLM.from_pretrained(target).lm_head.weight == 1.0).all())


def test_a_full_disk_while_writing_a_file(small_disk: Path) -> None:
    (small_disk / "output.txt").write_text("old")
    with pytest.raises(OSError, match="No space left on device"):
        write_file(small_disk / "output.txt", b"new" * 200_000)
    assert (small_disk / "output.txt").read_text() == "old" and len(os.listdir(small_disk)) == 1


def _as_nobody(work: Callable[[], None]) -> str:
    """What a user without rights gets: the error of `work`, run in a child that gives up its own."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
            os.write(writer, b"no error")
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, encoding="utf-8") as file:
        return file.read()


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A directory that anyone may enter."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_file_that_may_not_be_read(open_path: Path, name: str) -> None:
    directory = open_path / "model"
    model(1.0).save_pretrained(directory)
    assert _as_nobody(lambda: AutoModelForCausalLM.from_pretrained(directory, progress=False)) == "no error"
    (directory / name).chmod(0)
    said = _as_nobody(lambda: AutoModelForCausalLM.from_pretrained(directory, progress=False))
    assert said.startswith("CheckpointError: ") and str(directory / name) in said and "ermission denied" in said


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_that_may_not_be_read(open_path: Path, name: str) -> None:
    nllb(open_path)
    (open_path / name).chmod(0)
    said = _as_nobody(lambda: AutoTokenizer.from_pretrained(open_path))
    assert str(open_path / name) in said and "ermission denied" in said


def test_a_directory_that_may_not_be_written(open_path: Path) -> None:
    directory = open_path / "model"
    made = model(1.0)
    made.save_pretrained(directory)
    directory.chmod(0o555)
    said = _as_nobody(lambda: made.save_pretrained(directory))
    assert said.startswith("PermissionError: ") and str(directory) in said
    # A save that was interrupted there can be completed by its owner only.
    (directory / ".model.01234567.saved" / "files").mkdir(parents=True)
    said = _as_nobody(lambda: AutoModelForCausalLM.from_pretrained(directory))
    assert said.startswith("CheckpointError: ") and "interrupted" in said


def test_a_directory_that_is_removed_while_loading(tmp_path: Path) -> None:
    """A whole model, or a clear error; never half of one."""
    true = tmp_path / "true"
    model(1.0).save_pretrained(true, max_shard_size="20KB")
    loaded = failed = 0
    for round_ in range(40):
        directory = tmp_path / f"model{round_}"
        shutil.copytree(true, directory)
        delay = 0.0006 * round_

        def remove(directory: Path = directory, delay: float = delay) -> None:
            time.sleep(delay)
            shutil.rmtree(directory)

        remover = threading.Thread(target=remove)
        remover.start()
        try:
            found = AutoModelForCausalLM.from_pretrained(directory, progress=False)
            assert all(bool((parameter == 1.0).all()) for parameter in found.parameters())
            loaded += 1
        except CheckpointError:
            failed += 1
        finally:
            remover.join()
    assert loaded + failed == 40 and failed > 0
