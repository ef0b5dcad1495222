"""Training steps under FSDP2 and expert parallelism together, beside one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import training
from tests.processes import run_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(training.run, 4, str(tmp_path_factory.mktemp("training")))


@pytest.mark.parametrize("recipe", training.RECIPES)
def test_steps_are_those_of_one_process(found: list[dict[str, Any]], recipe: str) -> None:
    """Six experts on four ranks, one of which has none, and on two."""
    for rank in found:
        ways = ("foreach", "one by one") if recipe == training.RECIPES[0] else ("foreach",)
        for way in ways:
            differences = rank[f"{recipe}, {way}"]
            assert differences["losses and norms"] < 1e-5 and differences["weights"] < 1e-4


@pytest.mark.parametrize("recipe", training.RECIPES)
def test_a_checkpoint_loads_where_experts_are_divided_otherwise(found: list[dict[str, Any]], recipe: str) -> None:
    for rank in found:
        assert rank[f"{recipe}, checkpoint"]["whole state"]
        assert rank[f"{recipe}, checkpoint"]["difference"] < 1e-5
