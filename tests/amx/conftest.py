"""AMX kernels where there are no tile registers: the instructions as functions, in their place by the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.amx.build import missing_requirement
from tests.compiler import Compiler


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Keeps what it compiles from one run to the next; the tests that use it are skipped where nothing can be built."""
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return Compiler(Path(cache.mkdir("amx")) if cache is not None else tmp_path_factory.mktemp("amx"))
