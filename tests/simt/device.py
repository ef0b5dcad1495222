"""Runs CUDA launchers on the CPU, with torch tensors as device memory."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tests.simt.build import Builder
from tests.simt.params import STRUCTS, DType, InputPointer, OutputPointer, WeightPart

Field: TypeAlias = Tensor | list[Tensor] | int | float | torch.dtype | dict[str, Any] | None
Timing = Literal["eager", "late", "random"]
_TIMINGS: dict[Timing, int] = {"eager": 0, "late": 1, "random": 2}
_LOCATION = re.compile(r"(/\S+\.so)\+0x([0-9a-f]+)")


class SimtError(RuntimeError):
    """A launch broke a rule of the programming model, or a launcher returned an error."""


@dataclass(frozen=True)
class Settings:
    """How a launch runs.

    Attributes:
        seed: of the order of threads and blocks; 0 runs them in order.
        timing: when asynchronous copies and multiplications take effect.
        check_races: report accesses to shared memory that no barrier orders, and missing proxy fences.
        compute_capability: of the device that launchers see, 80 or 90.
        sm_count: of that device; small, so that persistent kernels stay quick.
        smem_offset: from a multiple of 1024 bytes to where dynamic shared memory starts.
        watchdog_seconds: CPU time the threads may spend without any of them getting anywhere.
    """

    seed: int = 1
    timing: Timing = "random"
    check_races: bool = True
    compute_capability: int = 90
    sm_count: int = 4
    smem_offset: int = 0
    watchdog_seconds: float = 20.0


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of which every byte is 0xFF: NaN in the floating-point types, -1 in the integers."""
    count = 1
    for size in shape:
        count *= size
    return torch.full((count * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype).reshape(shape)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a possibly strided tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _with_source_lines(message: str) -> str:
    """Puts file and line behind every address in a kernel library."""

    def line_of(match: re.Match[str]) -> str:
        command = ["addr2line", "-Cie", match[1], f"0x{match[2]}"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            return match[0]
        lines = [line.split(" (")[0] for line in found.splitlines() if not line.startswith("?")]
        # Innermost first; the runtime's own headers tell nothing.
        ours = [line for line in lines if "simt/runtime" not in line]
        return " < ".join((ours or lines)[:3]) or match[0]

    return _LOCATION.sub(line_of, message)


class SimtLibrary:
    """A library of kernels and launchers, built by :class:`~tests.simt.build.Builder`."""

    def __init__(self, runtime: Path, kernels: Path) -> None:
        self._runtime = ctypes.CDLL(str(runtime))
        self._runtime.simt_last_error.restype = ctypes.c_char_p
        self._runtime.simt_launch_log.restype = ctypes.c_char_p
        self._runtime.simt_tensor_map_log.restype = ctypes.c_char_p
        self._runtime.simt_params_layout.restype = ctypes.c_char_p
        # Deep binding: the library finds the runtime's stand-ins before a CUDA runtime that torch may have loaded.
        self.path = kernels
        self._kernels = ctypes.CDLL(str(kernels), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        self._tables: list[ctypes.Array[Any]] = []  # of the current call
        self.launches: list[str] = []
        self.tensor_maps: list[list[int]] = []  # what the encoder of tensor maps was given, but for the address

    @property
    def params_layout(self) -> str:
        """Sizes and offsets of the parameter structs: lines ``struct field size offset``."""
        return self._runtime.simt_params_layout().decode()

    def call(self, function: str, *arguments: Tensor | int | float | None, settings: Settings | None = None) -> None:
        """Calls ``extern "C" cudaError_t function(...)``: tensors as pointers, ints as int64_t, floats as float.

        Raises:
            SimtError: a rule was broken, or the function returned an error.
        """
        values: list[Any] = []
        self._prepare(settings)
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                self._add_buffer(f"argument {i}", argument, writable=True)
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(ctypes.c_void_p(None))
        status = getattr(self._kernels, function)(*values)
        self._finish(function, status)

    @contextmanager
    def chain(self) -> Iterator[None]:
        """Within it a launch may overlap those of the calls before, as it may overlap those of its own call."""
        self._runtime.simt_chain(1)
        yield
        self._runtime.simt_chain(0)

    def run(self, op: str, *, settings: Settings | None = None, **fields: Field) -> None:
        """Calls the ``moekernels::run(params, stream)`` of this op.

        Every field of the op's struct is an argument: a tensor or None for a pointer, a torch dtype for a dtype, a
        dictionary for a struct. Where
        the op has a workspace and none is given, one of ``workspace_bytes(params)`` is made.

        Raises:
            TypeError: a field is missing or unknown.
            SimtError: a rule was broken, or the launcher returned an error.
        """
        self._prepare(settings)
        struct = STRUCTS[op]
        names = [field[0] for field in struct._fields_]
        self._tables.clear()
        if "workspace" in names and fields.get("workspace") is None and self._workspace_function(struct) is not None:
            fields["workspace"] = None
            fields["workspace"] = poisoned((self._workspace_bytes(op, fields),), torch.uint8)
        params = self._fill(struct, fields)
        launcher = self._kernels[f"_ZN10moekernels3runERKNS_{_mangled(struct)}EP11CUstream_st"]
        status = launcher(ctypes.byref(params), ctypes.c_void_p(None))
        self._finish(op, status)

    def workspace_bytes(self, op: str, **fields: Field) -> int:
        """What ``moekernels::workspace_bytes(params)`` of this op returns."""
        self._prepare(None)
        return self._workspace_bytes(op, {"workspace": None, **fields})

    def _workspace_bytes(self, op: str, fields: Mapping[str, Field]) -> int:
        struct = STRUCTS[op]
        params = self._fill(struct, fields)
        function = self._workspace_function(struct)
        assert function is not None, f"{op} has no workspace"
        return function(ctypes.byref(params))

    def _workspace_function(self, struct: type[ctypes.Structure]) -> Any:
        """``workspace_bytes`` of these parameters, None in a library without it."""
        function = getattr(self._kernels, f"_ZN10moekernels15workspace_bytesERKNS_{_mangled(struct)}E", None)
        if function is not None:
            function.restype = ctypes.c_int64
        return function

    def _fill(self, struct: type[ctypes.Structure], fields: Mapping[str, Field]) -> ctypes.Structure:
        kinds: dict[str, Any] = {field[0]: field[1] for field in struct._fields_}
        if set(fields) - set(kinds):
            raise TypeError(f"{struct.__name__} has no field {sorted(set(fields) - set(kinds))}")
        params = struct()
        for name, kind in kinds.items():
            pointer = issubclass(kind, (InputPointer, OutputPointer))
            if name not in fields and not pointer:
                raise TypeError(f"{struct.__name__}.{name} is missing")
            value: Any = fields.get(name)
            if isinstance(value, dict):
                value = self._fill(kind, value)
            elif isinstance(value, Tensor):
                self._add_buffer(name, value, writable=issubclass(kind, OutputPointer))
                value = value.data_ptr()
            elif isinstance(value, torch.dtype):
                value = DType.of(value)
            elif isinstance(value, list):
                value = ctypes.addressof(self._table(name, value))
            setattr(params, name, kind(value) if pointer else value)
        return params

    def _table(self, name: str, parts: list[Tensor]) -> ctypes.Array[Any]:
        """The array in host memory that says where these matrices or vectors are."""
        entry: Any = ctypes.c_void_p if parts[0].dim() == 1 else WeightPart
        table = (entry * len(parts))()
        for i, part in enumerate(parts):
            self._add_buffer(f"{name}[{i}]", part, writable=False)
            table[i] = part.data_ptr() if part.dim() == 1 else WeightPart(part.data_ptr(), part.stride(0))
        self._tables.append(table)
        return table

    def _prepare(self, settings: Settings | None) -> None:
        settings = settings or Settings()
        self._runtime.simt_reset()
        self._runtime.simt_configure(
            ctypes.c_uint64(settings.seed),
            _TIMINGS[settings.timing],
            int(settings.check_races),
            settings.smem_offset,
            ctypes.c_double(settings.watchdog_seconds),
        )
        self._runtime.simt_set_device(settings.compute_capability, settings.sm_count)

    def _add_buffer(self, name: str, tensor: Tensor, *, writable: bool) -> None:
        self._runtime.simt_add_buffer(
            name.encode(), ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(_extent(tensor)), int(writable)
        )

    def _finish(self, function: str, status: int) -> None:
        """Turns the outcome of a call into ``launches``, or into an exception."""
        self.launches = self._runtime.simt_launch_log().decode().splitlines()
        encoded = self._runtime.simt_tensor_map_log().decode().splitlines()
        self.tensor_maps = [[int(number) for number in line.split()] for line in encoded]
        error = self._runtime.simt_last_error().decode()
        self._runtime.simt_reset()
        if error:
            raise SimtError(_with_source_lines(error))
        if status != 0:
            raise SimtError(f"{function} returned cudaError_t {status}")


def _mangled(struct: type[ctypes.Structure]) -> str:
    return f"{len(struct.__name__)}{struct.__name__}"


class Simt:
    """Builds libraries on demand and keeps them loaded."""

    def __init__(self, cache_dir: Path) -> None:
        self._builder = Builder(cache_dir)
        self._libraries: dict[Path, SimtLibrary] = {}

    def library(self, *sources: str | Path, defines: tuple[str, ...] = ()) -> SimtLibrary:
        """The library of these sources; a relative path is one in ``csrc/cuda`` or an instance.

        Raises:
            BuildError: a source does not compile.
        """
        built = self._builder.kernel(*sources, defines=defines)
        return self.load(built)

    def load(self, built: Path) -> SimtLibrary:
        """The library in this file, which ``library`` has built."""
        if built not in self._libraries:
            self._libraries[built] = SimtLibrary(self._builder.runtime(), built)
        return self._libraries[built]
