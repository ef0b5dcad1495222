"""CONTRIBUTING.md says how an op is added; here somebody does what it says, on a copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from moekernels import _C

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPE = PAGE[PAGE.index("## Adding an op") : PAGE.index("## Adding a model")]


@dataclass(frozen=True)
class Step:
    """A block of the page: a new file, or lines before or after the one line of a file that has `anchor`."""

    path: str
    where: str
    anchor: str
    code: str

    def take(self, tree: Path) -> None:
        path = tree / self.path
        if self.where == "new":
            assert not path.exists(), path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.code)
            return
        lines = path.read_text().splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if self.anchor in line]
        assert len(found) == 1, f"{self.path} has {len(found)} lines with {self.anchor!r}"
        at = found[0] + (self.where == "after")
        space = "\n\n" if self.code.startswith(("def ", "@")) else ""  # between functions
        path.write_text("".join([*lines[:at], self.code, space, *lines[at:]]))


BLOCK = r"^`([^`]+)`, (new|(?:before|after)(?= `))(?: `([^`]+)`)?:\n\n```(?:cpp|python|text)\n(.*?)```$"
STEPS = [Step(*found) for found in re.findall(BLOCK, RECIPE, re.MULTILINE | re.DOTALL)]


def test_every_block_is_a_step() -> None:
    assert len(STEPS) == RECIPE.count("```") // 2 >= 10


def test_every_place_named_exists() -> None:
    made = {step.path for step in STEPS if step.where == "new"}
    places = re.findall(r"`((?:csrc|python|tests|docs)/[\w./]+|mkdocs\.yml)`", RECIPE)
    assert [place for place in places if place not in made and not (ROOT / place).exists()] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_recipe_adds_an_op(tmp_path: Path) -> None:
    """What is new is compiled into a library of its own, which stands in for the rest of a rebuild."""
    if (ROOT / "csrc" / "cpu" / "expert_counts.cpp").exists():
        pytest.skip("the tree has the example's op already")
    built = Path(_C.__file__).parent
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "ops" / "test_register.py", tmp_path / "tests" / "ops")
    for step in STEPS:
        step.take(tmp_path)
    for library in (Path(_C.__file__), *built.glob("libmoekernels*.so")):
        (tmp_path / "python" / "moekernels" / library.name).symlink_to(library)

    new = [step.path for step in STEPS if step.where == "new" and step.path.endswith(".cpp")]
    shared = [f"csrc/torch/{name}.cpp" for name in ("checks", "allocate", "launch")]
    schema, kernel = (step.code for step in STEPS if step.path == "csrc/torch/library.cpp")
    unit = "".join(f'#include "{tmp_path / path}"\n' for path in ("csrc/torch/box.h", *new, *shared))
    unit += f"STABLE_TORCH_LIBRARY_FRAGMENT(moekernels, m) {{\n{schema}}}\n"
    unit += f"STABLE_TORCH_LIBRARY_IMPL(moekernels, CPU, m) {{\n{kernel}}}\n"
    (tmp_path / "unit.cpp").write_text(unit)
    includes = [f"-I{tmp_path / folder}" for folder in ("csrc", "csrc/include", "csrc/torch")]
    includes += [f"-isystem{folder}" for folder in include_paths()]
    command = ["g++", "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *includes, "unit.cpp", "-o", "new.so"]
    command += [f"-L{built}", "-l:libmoekernels.so", f"-Wl,-rpath,{built}"]
    command += [*(f"-L{folder}" for folder in library_paths()), "-ltorch_cpu", "-Wl,--allow-shlib-undefined"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    # An editable install would put its own files before those of the copy.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, "python")
import pytest, torch
torch.ops.load_library("new.so")
import moekernels
assert moekernels.__file__.startswith(sys.argv[1]), moekernels.__file__
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "tests/ops/test_expert_counts.py"]))
"""
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 passed" in result.stdout
    assert not hasattr(torch.ops.moekernels, "expert_counts")  # here nothing has changed
