"""Names of the Hugging Face Hub: in a cache laid out as huggingface_hub does, and asked of a server beside the test."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from moekernels.checkpoint import (
    TOKENIZER_FILES,
    CheckpointNotFoundError,
    resolve,
    resolve_weights,
    take_hub_options,
)
from moekernels.checkpoint.hub import CONFIG_FILES

NAME = "owner/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, files: dict[str, str], revision: str = "main", commit: str = COMMIT) -> Path:
    """Files in a cache: blobs, a snapshot of links to them, a reference to the snapshot."""
    home = cache / "models--owner--some-model"
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content.encode()).hexdigest()
        link = home / "snapshots" / commit / name
        for path in (blob, link, home / "refs" / revision):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link.symlink_to(blob)
    (home / "refs" / revision).write_text(commit)
    return home / "snapshots" / commit


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    snapshot = cached(cache, {"config.json": "{}"})
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME, CONFIG_FILES, cache_dir=cache) == snapshot
    local = Path(NAME)
    (local / "inner").mkdir(parents=True)
    for name in (NAME, local, str(tmp_path / NAME)):
        assert resolve(name, CONFIG_FILES, cache_dir=cache) == Path(name)
        assert resolve_weights(name, cache_dir=cache) == Path(name)
        assert resolve(name, CONFIG_FILES, subfolder="inner") == Path(name) / "inner"
    with pytest.raises(
        CheckpointNotFoundError, match=r"'owner/some-model' has no folder 'outer': no owner/some-model/ou"
    ):
        resolve(NAME, CONFIG_FILES, subfolder="outer")


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(tmp_path, {"config.json": "{}", "inner/config.json": "{}"})
    second = cached(tmp_path, {"config.json": '{"a": 1}'}, revision="v2", commit=COMMIT[::-1])
    assert resolve(NAME, CONFIG_FILES, cache_dir=tmp_path) == first
    assert resolve(NAME, CONFIG_FILES, cache_dir=str(tmp_path), subfolder="inner") == first / "inner"
    for revision in ("v2", COMMIT[::-1]):
        assert resolve(NAME, CONFIG_FILES, cache_dir=tmp_path, revision=revision) == second
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve(NAME, TOKENIZER_FILES) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert resolve(NAME, TOKENIZER_FILES, local_files_only=True) == first


def test_not_in_the_cache(tmp_path: Path) -> None:
    cached(tmp_path, {"config.json": "{}"})
    looked = rf"looked in {tmp_path}/models--owner--some-model\), and https://huggingface.co was not asked"
    with pytest.raises(
        CheckpointNotFoundError,
        match=rf"no such checkpoint directory: 'owner/some-model' .*'v2'.*{looked} \(HF_HUB_OFF",
    ):
        resolve(NAME, CONFIG_FILES, cache_dir=tmp_path, revision="v2")
    with pytest.raises(FileNotFoundError, match=r"other--model\), and .* was not asked \(local_files_only=True\)"):
        resolve("other/model", CONFIG_FILES, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["no/such/place", "./place", "/no/such", "", "~/place", "place/", "../place", "a b"])
def test_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint directory.*nor is it a name on the Hugging"):
        resolve(name or "nowhere/", CONFIG_FILES)


def test_names_the_hub_forbids() -> None:
    with pytest.raises(CheckpointNotFoundError, match="'a--b/c'.*does not allow such names"):
        resolve("a--b/c", CONFIG_FILES)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointNotFoundError, match=r"pip install 'moekernels\[hub\]'"):
        resolve(NAME, CONFIG_FILES)


def test_options() -> None:
    kwargs = {"revision": "v2", "token": "t", "num_experts": 3}
    assert take_hub_options(kwargs) == {"revision": "v2", "token": "t"}
    assert kwargs == {"num_experts": 3}
