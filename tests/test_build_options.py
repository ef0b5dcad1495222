"""What the build decides about CUDA, by configuring alone: nothing is compiled for a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTION = ROOT / "third_party" / "CudaOption.cmake"

needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
pytestmark = needs_cmake


def decide(directory: Path, torch_cuda: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Configures a project of nothing but the decision, beside a torch built with `torch_cuda` ("" for a CPU build)."""
    (directory / "CMakeLists.txt").write_text(
        f"""cmake_minimum_required(VERSION 3.24)
project(decision LANGUAGES NONE)
set(TorchStable_CUDA "{torch_cuda}")
set(TorchStable_VERSION 9.9.9)
include("{OPTION}")
message(STATUS "decided ${{MOEKERNELS_USE_CUDA}} [${{MOEKERNELS_CUDA_ARCH_LIST}}] ${{MOEKERNELS_CUDA_REASON}}")
message(STATUS "Hopper ${{MOEKERNELS_HAS_SM90A}}")
"""
    )
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    command = ["cmake", "-S", directory, "-B", directory / "build", *defines]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOEKERNELS_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_cpu_build_of_torch_gets_no_cuda_kernels(tmp_path: Path) -> None:
    done = decide(tmp_path, "", MOEKERNELS_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "decided OFF [] torch 9.9.9 has no CUDA; MOEKERNELS_CUDA=on builds them all the same" in done.stdout


def test_off_leaves_them_out_everywhere(tmp_path: Path) -> None:
    done = decide(tmp_path, "13.0", MOEKERNELS_CUDA="off")
    assert "decided OFF [] switched off by MOEKERNELS_CUDA=off" in done.stdout


@needs_nvcc
@pytest.mark.parametrize(("setting", "torch_cuda"), [("auto", "13.0"), ("on", "")])
def test_they_are_built_for_a_cuda_torch_and_on_request(tmp_path: Path, setting: str, torch_cuda: str) -> None:
    done = decide(tmp_path, torch_cuda, MOEKERNELS_CUDA=setting, MOEKERNELS_CUDA_ARCHS="90")
    assert done.returncode == 0, done.stderr
    assert "decided ON [90a]" in done.stdout


@needs_nvcc
@pytest.mark.parametrize(("archs", "has_hopper"), [("80;90", "ON"), ("90a-real", "ON"), ("80;89", "OFF")])
def test_the_kernels_know_whether_they_are_built_for_hopper(tmp_path: Path, archs: str, has_hopper: str) -> None:
    done = decide(tmp_path, "13.0", MOEKERNELS_CUDA_ARCHS=archs)
    assert f"-- Hopper {has_hopper}\n" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MOEKERNELS_CUDA": "yes"}, "MOEKERNELS_CUDA must be auto, on or off, got 'yes'"),
        pytest.param(
            {"MOEKERNELS_CUDA": "on", "MOEKERNELS_CUDA_ARCHS": "native"},
            "MOEKERNELS_CUDA_ARCHS must name architectures from 80 on",
            marks=needs_nvcc,
        ),
        pytest.param({"MOEKERNELS_CUDA": "on", "MOEKERNELS_CUDA_ARCHS": "75"}, "got '75'", marks=needs_nvcc),
        pytest.param(
            {"MOEKERNELS_CUDA": "on", "MOEKERNELS_CUDA_ARCHS": "80;199"}, "'199' is unknown to", marks=needs_nvcc
        ),
        ({"MOEKERNELS_CUDA": "on", "CMAKE_CUDA_COMPILER": "/nowhere/nvcc"}, "/nowhere/nvcc is no working nvcc"),
    ],
)
def test_bad_settings_end_in_one_clear_line(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    done = decide(tmp_path, "13.0", **settings)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
