"""PEP 517 backend: scikit-build-core, plus torch as a build requirement only where none is installed.

A fixed ``requires = ["torch"]`` would make every isolated build download a second torch of several gigabytes. The
extension needs nothing but torch's headers, so the copy that is already installed serves.
"""

from __future__ import annotations

from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.build import get_requires_for_build_editable as _requires_for_editable
from scikit_build_core.build import get_requires_for_build_wheel as _requires_for_wheel

from find_torch import MINIMUM_VERSION, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [f"torch>={'.'.join(map(str, MINIMUM_VERSION))}"]


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    return _requires_for_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    return _requires_for_editable(config_settings) + _torch_requirement()
