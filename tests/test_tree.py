"""Rules about the source tree that a compiler does not check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "moekernels"


@pytest.mark.parametrize("directory", ["include", "cpu", "cuda"])
def test_kernels_know_no_torch(directory: str) -> None:
    for path in (CSRC / directory).rglob("*.*"):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_inline_ptx_lives_in_one_place() -> None:
    for path in (CSRC / "cuda").rglob("*.*"):
        if path.name not in ("ptx.cuh", "wgmma.cuh"):
            assert not re.search(r"\basm\b", path.read_text()), path


# Each package may import those before it, and itself.
LAYERS = ("checkpoint", "ops", "nn", "bench", "generation", "tokenizers", "models", "pipelines", "demo", "cli")


def test_imports_point_one_way() -> None:
    for position, layer in enumerate(LAYERS):
        later = "|".join(LAYERS[position + 1 :]) or "nothing"
        for path in (PYTHON / layer).rglob("*.py"):
            found = re.search(rf"^\s*(from|import) moekernels\.({later})\b", path.read_text(), re.MULTILINE)
            assert not found, f"{path}: {found and found[0]}"


def test_integrations_stand_apart() -> None:
    for path in PYTHON.rglob("*.py"):
        text = path.read_text()
        if path.is_relative_to(PYTHON / "integrations"):
            found = re.findall(r"^\s*(?:from|import) moekernels\.(\w+)", text, re.MULTILINE)
            assert set(found) <= {"_version", "integrations", "nn", "ops"}, path
        else:
            assert "moekernels.integrations" not in text, path


def test_only_the_command_measures() -> None:
    for path in PYTHON.rglob("*.py"):
        if path.relative_to(PYTHON).parts[0] not in ("bench", "cli"):
            assert "moekernels.bench" not in path.read_text(), path
