"""Loads the compiled part of the package, or says in one sentence why it cannot be loaded."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from moekernels._version import __version__

_REBUILD = "Reinstall the package for this interpreter: pip install --force-reinstall --no-deps moekernels (or `.`)."


def _import_extension() -> Any:
    try:
        import moekernels._C as _C
    except ImportError as error:
        found = ", ".join(path.name for path in Path(__file__).parent.glob("_C*.so")) or "none"
        raise ImportError(
            f"moekernels: the compiled module _C could not be imported by Python {platform.python_version()} "
            f"on {platform.machine()} ({error}); compiled modules found: {found}. {_REBUILD}"
        ) from error
    return _C


def _check_versions(info: dict[str, Any]) -> None:
    if info["version"] != __version__:
        raise ImportError(
            f"moekernels: the Python files are version {__version__}, but the compiled module is {info['version']} "
            f"(git {info['git_revision']}). {_REBUILD}"
        )
    running = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    minimum = tuple(int(number) for number in info["torch_minimum"].split("."))
    if running < minimum:
        raise ImportError(
            f"moekernels: built for torch {info['torch_minimum']} and newer, but torch {torch.__version__} is running. "
            f"Upgrade it: pip install 'torch>={info['torch_minimum']}'."
        )


def _load_ops(info: dict[str, Any]) -> None:
    library = Path(__file__).parent / "libmoekernels_torch.so"
    # An editable install keeps the libraries beside the compiled module, wherever that is.
    if not library.exists():
        library = Path(_C.__file__).parent / library.name
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"moekernels: {library.name} could not be loaded. It was built against torch {info['torch_built']} by "
            f"{info['cxx_compiler']} (loads under torch {info['torch_minimum']} and newer); running: torch "
            f"{torch.__version__}. The loader said: {error.__cause__ or error}. {_REBUILD}"
        ) from error


_C = _import_extension()
_check_versions(_C.build_info())
_load_ops(_C.build_info())


def build_info() -> dict[str, Any]:
    """What this build of the package is and what it runs on.

    Returns:
        A dict of plain values: ``version``, ``git_revision``, ``cxx_compiler``, ``cuda_compiler`` (empty without CUDA),
        ``cuda_archs`` (list), ``cuda_reason`` (why CUDA was left out, else empty), ``cpu_isas`` (list, those that this
        machine can run), ``cpu_isa`` (in use), ``torch_built`` (whose headers were used), ``torch_running``,
        ``torch_minimum`` and ``python_built``.
    """
    return {**_C.build_info(), "torch_running": torch.__version__}


def include_dir() -> Path:
    """The directory of the C++ headers (``#include "moekernels/cpu.h"``)."""
    return Path(_C.__file__).parent / "include"


def cmake_dir() -> Path:
    """The directory of the CMake package, for ``CMAKE_PREFIX_PATH`` or ``moekernels_DIR``."""
    return Path(_C.__file__).parent / "cmake"
