"""A layer whose experts are on several processes, beside the same layer on one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed import layers
from tests.processes import run_processes

# What a sum in another order may be off by, beside the largest value: of a sum of float32, and of one of bfloat16.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.03}


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_processes(layers.run, request.param)


def test_every_way_is_as_one_process(found: list[dict[str, Any]]) -> None:
    for ranks, (name, way, dtype) in itertools.product(found, itertools.product(layers.LAYERS, layers.WAYS, TOLERANCE)):
        case = f"{name}, {way}, {dtype}"
        differences = dict(ranks[case])
        assert differences.pop("logits") == 0.0, case
        if way.startswith("exact"):
            assert differences.pop("output") == 0.0, case
        for what, difference in differences.items():
            assert difference <= TOLERANCE[dtype], f"{case}: {what} is off by {difference}"


def test_stacks_are_dtensors(found: list[dict[str, Any]]) -> None:
    assert found[0]["placements"] == {2: [3, 2], 4: [2, 2, 1, 0]}[len(found)]


def test_a_style_for_parallelize_module(found: list[dict[str, Any]]) -> None:
    assert [ranks["parallelize_module"] for ranks in found] == [0.0] * len(found)


def test_ranks_that_compute_alike_draw_alike(found: list[dict[str, Any]]) -> None:
    assert len(set(found[0]["dropout"]["drawn"])) == 1
    assert found[0]["dropout"]["differs"] > 0.1  # activations were dropped


def test_little_more_is_sent_than_the_routing_needs(found: list[dict[str, Any]]) -> None:
    for rank in found:
        sent, least = rank["sent"]["all_to_all, partial"]
        assert 0 < least <= sent <= 1.05 * least
        assert rank["sent"]["all_to_all, exact"][0] == sent  # of two choices on two ranks each has one


@pytest.mark.parametrize("sums", ["exact", "partial"])
def test_choices_beyond_a_fixed_number_of_rows_are_dropped(found: list[dict[str, Any]], sums: str) -> None:
    for rank in found:
        few = rank[f"few rows, {sums}"]
        assert few["output"] <= TOLERANCE["float32"]
        assert few["counted"] == few["expected"]
    assert any(rank[f"few rows, {sums}"]["counted"][0] > 0 for rank in found)


def test_with_a_fixed_number_of_rows_no_sizes_are_exchanged(found: list[dict[str, Any]]) -> None:
    rows = [f"{what} of a sparse layer" for what in ("tokens", "outputs")]
    for rank in found:
        assert rank["exchanges"]["exact, fixed rows"] == rows
        assert rank["exchanges"]["exact"] == ["the numbers of tokens of a sparse layer", *rows]


@pytest.mark.parametrize("way", layers.COMPILED)
def test_compiled(found: list[dict[str, Any]], way: str) -> None:
    if len(found) != 2:
        pytest.skip("two processes do")
    for rank in found:
        for what, difference in rank[f"compiled, {way}"].items():
            assert difference <= TOLERANCE["float32"], f"{what} is off by {difference}"
