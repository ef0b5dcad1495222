"""benchmarks/gpu_check.py: what its calls run is there and takes these options; a part that fails ends alone.

Nothing is measured or tested here; `gpu_check.py --device cpu --quick` is the rehearsal.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moekernels.bench.backward import BACKWARD

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


class Parsed(Exception):
    """A benchmark has read its options."""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_check")


def make_check(
    module: ModuleType, folder: Path, seconds: float = 60.0, device: str = "cuda", quick: bool = False
) -> Any:
    (folder / "failed-tests.txt").write_text("tests/gpu/test_bits.py::test_one\n")
    end = time.monotonic() + seconds
    return module.Check(device, quick, "call-1", folder / "out", folder, folder / "failed-tests.txt", end)


def parse(script: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a benchmark up to where it would measure."""

    def stop(*_: object) -> None:
        raise Parsed

    program = importlib.import_module(script.stem)
    monkeypatch.setattr(program, "measure_roofs", stop)
    with pytest.raises(Parsed):
        program.main(options)


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_can_be_given(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, quick: bool
) -> None:
    commands: list[list[str]] = []

    def record(self: object, part: str, name: str, command: list[object], *_: object, **__: object) -> object:
        commands.append([str(word) for word in command])
        return gpu_check.Step(part, name, "", "passed")

    monkeypatch.setattr(gpu_check.Check, "run", record)
    check = make_check(gpu_check, tmp_path, device=device, quick=quick)
    for parts, _ in gpu_check.CALLS.values():
        for part in parts:
            gpu_check.PARTS[part](check)

    benchmarks = [c for c in commands if c[1].endswith(".py") and Path(c[1]).parent.name == "benchmarks"]
    assert len(benchmarks) == 10
    for _, script, *options in benchmarks:
        options[options.index("--device") + 1] = "cpu"
        parse(Path(script), options, monkeypatch)
    tests = [word for c in commands if "pytest" in c for word in c if word.startswith("tests/")]
    assert len(tests) > 8 - quick * 3 - (device == "cpu")
    for name in tests:
        assert (ROOT / name.partition("::")[0]).exists(), name


def test_the_kernels_of_the_backward_pass(gpu_check: ModuleType) -> None:
    assert gpu_check.BACKWARD == BACKWARD


def test_the_module_for_another_python_has_all_of_its_sources(gpu_check: ModuleType, tmp_path: Path) -> None:
    named = re.search(r"pybind11_add_module\(_C ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert named is not None
    command = gpu_check._module_command(tmp_path)
    assert {str(ROOT / source) for source in named[1].split()} <= {str(word) for word in command}


def test_what_fails_hangs_or_is_missing_ends_alone(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = make_check(gpu_check, tmp_path)
    failing = "print('FAILED tests/ops/test_plan.py::test_x[cuda-1] - AssertionError'); raise SystemExit(1)"
    steps = [
        check.run("tests", "fails", [PYTHON, "-c", failing], 30),
        check.run("tests", "hangs", [PYTHON, "-c", "import time; print('began', flush=True); time.sleep(60)"], 6),
        check.run("memcheck", "is missing", [tmp_path / "compute-sanitizer"], 30),
        check.run("decode", "goes on", [PYTHON, "-c", "print('done')"], 30),
    ]
    assert [step.status for step in steps] == ["failed", "timed out", "missing", "passed"]
    assert steps[1].output == "began\n" and steps[1].seconds < 20
    check.deadline = time.monotonic()
    assert check.run("others", "too late", [PYTHON, "-c", ""], 30).status == "skipped"

    (record,) = (tmp_path / "out").glob("*-call-1.json")
    assert [step["status"] for step in json.loads(record.read_text())["steps"]][-2:] == ["passed", "skipped"]
    assert (tmp_path / "out" / "failed-tests.txt").read_text() == "tests/ops/test_plan.py::test_x[cuda-1]\n"
    assert re.search(r"tests: hangs\n.*\nbegan\n\ntimed out", record.with_suffix(".log").read_text())
    assert "| memcheck | is missing | missing |" in record.with_suffix(".md").read_text()
