"""Names of the Hugging Face Hub: in a cache laid out as huggingface_hub does, and asked of a server beside the test."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
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
    with pytest.raises(CheckpointNotFoundError, match="has no folder 'outer': no owner/some-model/outer"):
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


@pytest.mark.parametrize("name", ["no/such/place", "./place", "/no/such", "~/place", "place/", "../place", "a b"])
def test_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no such checkpoint directory.*nor is it a name on the Hugging"):
        resolve(name, CONFIG_FILES)


def test_names_the_hub_forbids() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"'a--b/c'.*does not allow such names"):
        resolve("a--b/c", CONFIG_FILES)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointNotFoundError, match=r"pip install 'moekernels\[hub\]'"):
        resolve(NAME, CONFIG_FILES)


def test_options() -> None:
    kwargs = {"revision": "v2", "token": "t", "num_experts": 3}
    assert take_hub_options(kwargs) == {"revision": "v2", "token": "t"}
    assert kwargs == {"num_experts": 3}


# Over the network: a server beside the test, asked by another process, as huggingface_hub reads its settings once.

WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
TOKENIZER = ["added_tokens.json", "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
OTHERS = ["README.md", "modeling_some.py", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "consolidated.pt"]
REPOSITORIES = {
    "owner/both": [*WEIGHTS, *PICKLES, *TOKENIZER, *OTHERS, "config.json", "generation_config.json"],
    "owner/pickled": [*PICKLES, *OTHERS, "config.json"],
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as huggingface_hub needs to fetch a repository; a file holds its own name."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        status, body, headers = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        for name, files in REPOSITORIES.items():
            file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                status, body, headers = 200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}
            elif path == f"/api/models/{name}/tree/{COMMIT}":
                entries = [{"type": "file", "path": file, "size": len(file), "oid": file} for file in files]
                status, body, headers = 200, json.dumps(entries).encode(), {}
            elif path.startswith(f"/api/models/{name}"):
                headers = {"X-Error-Code": "RevisionNotFound"}
            elif file in files:
                etag = hashlib.sha256(file.encode()).hexdigest()
                status, body, headers = 200, file.encode(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if "gated" in path:
            headers = {"X-Error-Code": "GatedRepo"}
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


_ASK = """
import json, sys
from pathlib import Path
from moekernels import checkpoint
for function, *arguments, options in json.load(sys.stdin):
    try:
        found = getattr(checkpoint, function)(*arguments, **options)
        files = sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file())
        assert all((found / file).read_text() == file for file in files)
        print(json.dumps(files))
    except checkpoint.CheckpointError as error:
        print(json.dumps(str(error)))
"""


def _ask(endpoint: str, *calls: tuple[Any, ...]) -> list[Any]:
    """What the functions of `moekernels.checkpoint` return in another process: names of files, or a message."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    arguments = {"input": json.dumps(calls), "capture_output": True, "text": True, "env": environment}
    result = subprocess.run([sys.executable, "-c", _ASK], check=True, timeout=120, **arguments)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_only_what_is_needed_is_fetched(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    first, second, third = ({"cache_dir": str(tmp_path / name)} for name in ("first", "second", "third"))
    try:
        found = _ask(
            f"http://127.0.0.1:{server.server_address[1]}",
            ("resolve", "owner/both", TOKENIZER_FILES, first),
            ("resolve_weights", "owner/both", second),
            ("resolve_weights", "owner/both", False, third),
            ("resolve_weights", "owner/pickled", True, first),
            ("resolve_weights", "owner/pickled", first),
            ("resolve", "owner/nothing", CONFIG_FILES, first),
            ("resolve", "owner/gated", CONFIG_FILES, first),
            ("resolve", "owner/both", CONFIG_FILES, {"revision": "v3", **first}),
        )
    finally:
        server.shutdown()
        server.server_close()
    assert found[0] == sorted([*TOKENIZER, "config.json"])
    assert found[1] == sorted([*WEIGHTS, "config.json", "generation_config.json"])
    assert found[2] == sorted([*PICKLES, "config.json", "generation_config.json"])
    assert found[3] == ["config.json"]
    assert found[4] == sorted([*PICKLES, "config.json"])
    assert re.search(r"http://127.0.0.1:\d+ has no such repository, or it is private", found[5])
    assert re.search(r"access has to be asked for at http.*/owner/gated", found[6])
    assert re.search(r"/owner/both has no revision 'v3'", found[7])


def test_nobody_answers(tmp_path: Path) -> None:
    cached(tmp_path, {"config.json": "config.json"})
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        cache = {"cache_dir": str(tmp_path)}
        found = _ask(
            f"http://127.0.0.1:{unused.getsockname()[1]}",
            ("resolve", NAME, CONFIG_FILES, cache),
            ("resolve", NAME, CONFIG_FILES, {"revision": "v2", **cache}),
        )
    assert found[0] == ["config.json"]
    assert re.search(r"no complete revision 'v2' of it .* could not be asked: .*refused", found[1])
