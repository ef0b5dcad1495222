"""Finds the torch whose headers the extension is compiled against.

Used in two places: by the build backend, to decide whether torch must become a build requirement, and by CMake
(``python find_torch.py`` prints the directory). It must therefore run without torch being importable: under pip's build
isolation the installed torch is hidden from ``import`` but lies in site-packages all the same. MOEKERNELS_TORCH in the
environment names another one: the extension's libraries are the same for every Python.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MINIMUM_VERSION = (2, 11)


def _candidates() -> Iterator[Path]:
    if named := os.environ.get("MOEKERNELS_TORCH"):
        yield Path(named)
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        directories.append(site.getusersitepackages())
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        directories += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    yield from (Path(directory, "torch") for directory in directories)


def version_of(torch_dir: Path) -> tuple[int, ...]:
    """The (major, minor) of the torch in `torch_dir`, or () if it has no readable version."""
    try:
        text = (torch_dir / "version.py").read_text()
    except OSError:
        return ()
    match = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else ()


def find_torch() -> Path | None:
    """The directory of a torch that is new enough and carries the stable-ABI headers, or None."""
    for torch_dir in _candidates():
        if version_of(torch_dir) >= MINIMUM_VERSION and (torch_dir / "include/torch/csrc/stable/library.h").exists():
            return torch_dir
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        where = os.environ.get("MOEKERNELS_TORCH")
        place = f"is in MOEKERNELS_TORCH={where}" if where else f"was found by {sys.executable}"
        sys.exit(f"no torch >= {'.'.join(map(str, MINIMUM_VERSION))} with its C++ headers {place}")
    print(found)
