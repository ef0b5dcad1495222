"""What CuTe, the layout library in the headers of CUTLASS, says of the instructions that the kernels use."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.simt.build import cuda_include, missing_requirement

SOURCE = Path(__file__).parent / "cute_tables.cpp"


@cache
def cute_include() -> Path | None:
    """The folder of CuTe's headers in the package nvidia-cutlass, or None without it."""
    package = importlib.util.find_spec("cutlass_library")  # imports nothing: its Python needs other packages
    if package is None or package.origin is None:
        return None
    include = Path(package.origin).parent / "source" / "include"
    return include if (include / "cute" / "tensor.hpp").exists() else None


def missing() -> str | None:
    """Why the tables cannot be made here, or None."""
    if cute_include() is None:
        return "no CuTe headers: pip install --no-deps nvidia-cutlass==4.2.0.0"
    return missing_requirement()


def cute_tables(folder: Path) -> dict[str, Tensor]:
    """Every table of ``cute_tables.cpp`` as int64 [numbers]; made in ``folder`` unless they are there."""
    output = folder / f"cute_tables-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.txt"
    if not output.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _make(Path(scratch), output)
    named = (line.split(":") for line in output.read_text().splitlines())
    return {name: torch.tensor([int(number) for number in numbers.split()]) for name, numbers in named}


def _make(scratch: Path, output: Path) -> None:
    cuda = cuda_include()
    assert cuda is not None
    program, written = scratch / "cute_tables", scratch / "written.txt"
    headers = [str(cute_include()), str(cuda), str(cuda / "cccl")]
    # The version makes CuTe compile what encodes tensor maps.
    command = ["g++", "-std=c++17", "-O0", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"]
    command += [*(f"-isystem{header}" for header in headers), str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    # It says once per descriptor that the host has no shared memory: addresses are 0, as they should be.
    subprocess.run([str(program), str(written)], check=True, stdout=subprocess.DEVNULL)
    os.replace(written, output)
