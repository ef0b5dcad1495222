"""Other engines are installed on request only: nothing else of the project needs them."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from types import ModuleType


def add_install_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--install", action="store_true", help="install the other engine with pip first")


def required(install: bool, **packages: str) -> list[ModuleType]:
    """The modules of packages, `module="package"`, which are installed if asked for.

    Raises:
        SystemExit: one is missing.
    """
    if install:
        subprocess.run([sys.executable, "-m", "pip", "install", *packages.values()], check=True)
        importlib.invalidate_caches()
    try:
        return [importlib.import_module(module) for module in packages]
    except ImportError as error:
        raise SystemExit(f"{error}; --install installs {', '.join(packages.values())}") from error
