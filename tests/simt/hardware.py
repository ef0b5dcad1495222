"""The kernels that test the emulator, on a real GPU: the same calls, with the same tensors."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.simt.device import Settings, SimtLibrary
from tests.simt.nvcc import INCLUDES


def compile_program(source: Path, architecture: str, target: Path) -> Path:
    """A shared library of this source for one GPU (``90a``).

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    gpu = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++20", "--expt-relaxed-constexpr", gpu, *INCLUDES, "-shared", "-Xcompiler=-fPIC"]
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return target


def present_architecture() -> str:
    """Of the GPU that is here, with the instructions of its own that Hopper has."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


class HardwareLibrary:
    """As far as tests of the emulator need it, what :class:`~tests.simt.device.SimtLibrary` is."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def call(self, function: str, *arguments: Tensor | int | float | None, settings: Settings | None = None) -> None:
        """Calls ``extern "C" cudaError_t function(...)`` with copies of the tensors, and copies them back.

        Settings belong to the emulator; hardware has its own.

        Raises:
            RuntimeError: the function returned an error, or a kernel had a fault.
        """
        values: list[Any] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                copies.append((argument, argument.cuda()))
                values.append(ctypes.c_void_p(copies[-1][1].data_ptr()))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(ctypes.c_void_p(None))
        torch.cuda.synchronize()
        status = getattr(self._library, function)(*values)
        if status != 0:
            raise RuntimeError(f"{function} returned cudaError_t {status}")
        torch.cuda.synchronize()
        for given, copy in copies:
            given.copy_(copy)


# A kernel file's name to its library, emulated or real: the fixture `machine`.
Machine = Callable[[str], SimtLibrary | HardwareLibrary]
