from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moekernels import build_info
from moekernels.bench import machine as module
from moekernels.bench.machine import described, machine, revision_of


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a source file and a result, both committed."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("package/source.py", "benchmarks/results/old.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "first")
    return tmp_path


def git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


def test_machine(cpu: torch.device) -> None:
    about = machine(cpu)
    assert about["clock"] == "wall clock" and about["threads"] and about["device"] and about["revision"]
    assert f"torch {about['torch']}" in described(about)


def test_revision_of_a_checkout(checkout: Path) -> None:
    source = checkout / "package" / "source.py"
    commit = git(checkout, "rev-parse", "HEAD")[:12]
    assert revision_of(source) == commit
    (checkout / "benchmarks" / "results" / "old.json").write_text("2\n")
    (checkout / "new.json").write_text("2\n")
    assert revision_of(source) == commit
    source.write_text("2\n")
    assert revision_of(source) == f"{commit}+changes"
    git(checkout, "add", ".")
    assert revision_of(source) == f"{commit}+changes"
    source.write_text("1\n")
    git(checkout, "reset", "-q")
    assert revision_of(source) == commit
    (checkout / "benchmarks" / "program.py").write_text("1\n")
    git(checkout, "add", "benchmarks/program.py")
    assert revision_of(source) == f"{commit}+changes"


def test_revision_outside_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch, cpu: torch.device) -> None:
    """An installed package says that of its build, in a checkout of something else too."""
    installed = checkout / "site-packages" / "machine.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert revision_of(installed) == ""
    monkeypatch.setattr(module, "__file__", str(installed))
    assert machine(cpu)["revision"] == build_info()["git_revision"]
