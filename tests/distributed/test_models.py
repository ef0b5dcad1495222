"""Our models with their experts on several processes, beside the same models on one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import models
from tests.processes import run_processes


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(models.run, request.param, str(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("ranks", ["", ", one rank"])
@pytest.mark.parametrize("dispatch", models.DISPATCHES)
@pytest.mark.parametrize("name", models.SPARSE)
def test_a_training_step_is_as_on_one_process(
    found: list[dict[str, Any]], name: str, dispatch: str, ranks: str
) -> None:
    """Capacities over the whole batch, padding, auxiliary losses, router logits in order, all gradients."""
    if ranks and len(found) != 2:
        pytest.skip("a mesh of one rank is looked at once")
    for rank in found:
        for what, difference in rank[f"{name}, {dispatch}{ranks}"].items():
            assert difference <= 2e-6, f"{what} is off by {difference}"


@pytest.mark.parametrize("name", models.SPARSE)
def test_files(found: list[dict[str, Any]], name: str) -> None:
    files = [rank[f"{name}, files"] for rank in found]
    for rank in files:
        assert rank["is divided"]
        assert rank["weights"] == 0.0
        assert rank["same files"]
    assert sum(rank["share"] for rank in files) == pytest.approx(1.0)
    assert max(rank["share"] for rank in files) <= {2: 0.5, 4: 1 / 3}[len(found)] + 1e-6


@pytest.mark.parametrize("name", models.SPARSE)
def test_generation(found: list[dict[str, Any]], name: str) -> None:
    assert [rank[f"{name}, generate"] for rank in found] == [{"alike": True, "split": True}] * len(found)


@pytest.mark.parametrize("name", ["NLLB-MoE", "Switch"])
def test_training_curves(found: list[dict[str, Any]], name: str) -> None:
    if len(found) != 2:
        pytest.skip("two processes do")
    assert max(rank[f"{name}, curve"] for rank in found) < 1e-4
