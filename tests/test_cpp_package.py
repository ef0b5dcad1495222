"""The C++ package of an installed moekernels: the examples are built against it and run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import moekernels
from moekernels.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples" / "cpp"


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def cmake() -> str:
    found = shutil.which("cmake")
    if found is None and importlib.util.find_spec("cmake") is not None:
        from cmake import CMAKE_BIN_DIR  # the package of the same name

        found = str(Path(CMAKE_BIN_DIR) / "cmake")
    if found is None:
        pytest.skip("needs cmake")
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the built examples."""
    build = tmp_path_factory.mktemp("examples")
    prefixes = f"{moekernels.cmake_dir()};{torch.utils.cmake_prefix_path}"
    run(cmake(), "-S", EXAMPLES, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefixes}")
    run(cmake(), "--build", build)
    return build


@pytest.mark.parametrize("program", ["raw_pointers", "libtorch"])
def test_example_agrees_with_plain_loops(programs: Path, program: str) -> None:
    output = run(programs / program)
    assert "37 tokens through 8 experts" in output and float(output.split()[-1]) < 1e-5


def test_the_kernels_alone_need_no_torch(programs: Path) -> None:
    assert "torch" not in run("ldd", programs / "raw_pointers")


def test_directories_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--cmake-dir"]) == 0
    directory = Path(capsys.readouterr().out.strip())
    assert directory == moekernels.cmake_dir() and (directory / "moekernelsConfig.cmake").exists()
    assert main(["info", "--include-dir"]) == 0
    headers = Path(capsys.readouterr().out.strip())
    assert {path.name for path in (headers / "moekernels").iterdir()} == {
        "cpu.h",
        "memory.h",
        "cuda.h",
        "params.h",
        "torch_ops.h",
    }
