"""The C++ package of an installed moekernels: the examples are built against it and run."""

from __future__ import annotations

import importlib.util
import re
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


def why_not_libtorch(directory: Path) -> str | None:
    """Why no program can be built against this torch, or None; that of a CUDA build wants the whole CUDA toolkit."""
    if torch.version.cuda is None:
        return None
    (directory / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(probe LANGUAGES CXX)\nfind_package(Torch REQUIRED)\n"
    )
    probe = [
        cmake(),
        "-S",
        directory,
        "-B",
        directory / "build",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    found = subprocess.run(probe, capture_output=True, text=True, timeout=300)
    return None if found.returncode == 0 else f"find_package(Torch) of torch {torch.__version__} finds no CUDA toolkit"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    """The directory of the built examples, and why that with LibTorch is not among them."""
    build = tmp_path_factory.mktemp("examples")
    missing = why_not_libtorch(tmp_path_factory.mktemp("probe"))
    prefixes = f"{moekernels.cmake_dir()};{torch.utils.cmake_prefix_path}"
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefixes}", f"-DWITH_TORCH={missing is None}"]
    run(cmake(), "-S", EXAMPLES, "-B", build, *options)
    run(cmake(), "--build", build)
    return build, missing


@pytest.mark.parametrize("program", ["raw_pointers", "libtorch"])
def test_example_agrees_with_plain_loops(programs: tuple[Path, str | None], program: str) -> None:
    build, missing = programs
    if program == "libtorch" and missing:
        pytest.skip(missing)
    output = run(build / program)
    assert "37 tokens through 8 experts" in output and float(output.split()[-1]) < 1e-5


def test_the_kernels_alone_need_no_torch(programs: tuple[Path, str | None]) -> None:
    libraries = run("ldd", programs[0] / "raw_pointers")
    assert "libmoekernels.so" in libraries and not re.search(r"lib(torch|c10|moekernels_torch)", libraries)


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
