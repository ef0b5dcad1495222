from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekernels.bench.roofs import Roofs
from moekernels.bench.table import BOUND, Row, cells, load, record, render, save

ROOFS = Roofs(2e9, 3e9, {"bfloat16": 5e10})
ROWS = [
    Row("m permute", 16, "zipf", "bfloat16", 2.5e-5, 0.0, 5e4, 0.5, {"torch eager": 5e-5}, "wall clock"),
    Row("m up", 16, "zipf", "bfloat16", 1.5e-3, 3e6, 6e6, None, {BOUND: 1e-3, "other": 3e-3}, "wall clock"),
]


def test_cells() -> None:
    header, body = cells(ROWS)
    assert header == [
        "shape", "tokens", "routing", "dtype", "µs", "GFLOP/s", "GB/s", "% of roof",
        "× torch eager", f"× {BOUND}", "× other",
    ]  # fmt: skip
    assert body == [
        ["m permute", "16", "zipf", "bfloat16", "25.0", "–", "2.0", "50%", "2.00", "–", "–"],
        ["m up", "16", "zipf", "bfloat16", "1,500", "2.0", "4.0", "–", "–", "0.67", "2.00"],
    ]
    assert ROWS[1].speedup == 2.0  # a bound is no baseline
    other = Row("m up", 1, "zipf", "bfloat16", 1.0, 0.0, 1.0, 0.1, {}, "CUDA graph")
    header, body = cells([*ROWS, other])
    assert header[-1] == "clock" and [row[-1] for row in body] == ["wall clock", "wall clock", "CUDA graph"]
    assert other.speedup is None


def test_cells_of_baselines_that_failed() -> None:
    failures = {"a": "fails: IndexError: why", "b": "differs: by much"}
    row = Row("m up", 1, "zipf", "bfloat16", 1.0, 0.0, 1.0, 0.1, {"c": 3.0}, "wall clock", failures)
    header, body = cells([row, *ROWS])
    assert dict(zip(header, body[0], strict=True)) | {"× a": "fails", "× b": "differs", "× c": "3.00"} == dict(
        zip(header, body[0], strict=True)
    )
    assert body[1][header.index("× a")] == "–" and row.speedup == 3.0


def test_files(tmp_path: Path) -> None:
    about: dict[str, object] = {"device": "a CPU", "threads": 2}
    save(tmp_path / "new" / "rows.json", ROWS, ROOFS, about, "a command")
    content = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert content["command"] == "a command" and content["machine"] == about and content["mismatches"] == []
    roofs = {"read_bandwidth": 2e9, "copy_bandwidth": 3e9, "matmul": {"bfloat16": 5e10}}
    assert content["roofs"].items() >= roofs.items()
    assert load(tmp_path / "new" / "rows.json") == (ROWS, ROOFS, about)
    lines = (tmp_path / "new" / "rows.md").read_text().splitlines()
    assert lines[0] == "`a command`" and lines[2:] == render(ROWS, ROOFS, about).splitlines()
    assert lines[2] == "device a CPU, threads 2"
    assert lines[3] == "roofs: read 2.0 GB/s, copy 3.0 GB/s; matmul bfloat16 50 GFLOP/s"
    assert len({line.count("|") for line in lines[5:]}) == 1 and len(lines) == 9
    assert json.loads(record([], ROOFS, about, "", ["wrong"]))["mismatches"] == ["wrong"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "\xff", '{"machine": {}, "roofs": {}, "rows": []}', '{"machine": {}, "rows": [{"batch": 1}]}'],
)
def test_other_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} holds no rows of a measurement"):
        load(path)
