"""Warnings are errors where they are ours, and shown where other packages warn each other (pyproject.toml)."""

from __future__ import annotations

import warnings

import pytest


def warn_as(module: str) -> None:
    exec("import warnings; warnings.warn('soon gone', FutureWarning)", {"__name__": module})


@pytest.mark.parametrize("module", ["moekernels", "moekernels.nn.router", "tests", "tests.ops.test_route"])
def test_ours_are_errors(module: str) -> None:
    with pytest.raises(FutureWarning, match="soon gone"):
        warn_as(module)


@pytest.mark.parametrize(
    "module", ["torch.testing", "transformers.models.moekernels", "moekernels_of_others", "testsuite"]
)
def test_those_of_others_are_shown(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warn_as(module)
    assert [str(warning.message) for warning in caught] == ["soon gone"]


def test_a_deprecated_call_of_ours_is_an_error() -> None:
    """Whoever warns: a warning of a call belongs to the caller."""
    library: dict[str, object] = {"__name__": "library"}
    exec("import warnings\ndef old(): warnings.warn('use new()', DeprecationWarning, stacklevel=2)", library)
    with pytest.raises(DeprecationWarning, match=r"use new\(\)"):
        library["old"]()  # type: ignore[operator]
