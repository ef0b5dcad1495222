from __future__ import annotations

import re
import struct
from dataclasses import replace

import pytest

from moekernels.bench.roofs import Roofs
from moekernels.bench.table import BOUND, Row

pytest.importorskip("matplotlib")
from moekernels.bench.plot import draw

ROOFS = Roofs(4e10, 3e10, {"bfloat16": 3e11, "float32": 1e11})
ABOUT: dict[str, object] = {"device": "a CPU", "threads": 2}


def rows() -> list[Row]:
    found = []
    for tokens in (1, 16, 512):
        for kernel, factor in (("up", 4), ("down", 2), ("layer", 6), ("layer with routing", 6)):
            others = {"torch eager": 3e-3 / tokens, "torch grouped_mm": 1e-2}
            found.append(
                Row(f"m {kernel}", tokens, "uniform", "bfloat16", 2e-3, 1e7 * tokens * factor, 1e8, 0.5, others)
            )
    return found


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png[12:16] == b"IHDR"
    return struct.unpack(">II", png[16:24])


def test_picture() -> None:
    png = draw(rows(), ROOFS, ABOUT, "m")
    width, height = size(png)
    assert 1200 <= width <= 3000 and 500 <= height <= 1500 and 20_000 < len(png) < 1_000_000
    assert png != draw(rows()[:-1], ROOFS, ABOUT, "m")


def texts(svg: bytes) -> list[str]:
    """What is written in a picture: matplotlib puts every text in a comment before its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg.decode())


def test_speedups_per_dtype() -> None:
    found = []
    for dtype, slower in (("bfloat16", 30), ("float32", 20)):
        for row in rows():
            baselines = {**row.baselines, "transformers batched_mm": slower * row.seconds}
            found.append(replace(row, dtype=dtype, baselines=baselines))
    svg = draw(found, ROOFS, ABOUT, "m", "svg")
    assert svg == draw(found, ROOFS, ABOUT, "m", "svg") and svg.startswith(b"<?xml") and len(svg) < 150_000
    written = texts(svg)
    for dtype in ROOFS.matmul:
        assert written.count(f"The whole layer in {dtype}, times faster than") == 1
    # One line per baseline and kind of layer, one entry for both dtypes.
    assert written.count("torch grouped_mm") == written.count("torch grouped_mm, with routing") == 1
    assert "transformers batched_mm: 20× to 30×, not drawn" in written and "transformers batched_mm" not in written


def test_all_far() -> None:
    """What is slowest is left out only beside something nearer."""
    found = [replace(row, baselines={"torch eager": 8 * row.seconds, BOUND: 90 * row.seconds}) for row in rows()]
    written = texts(draw(found, ROOFS, ABOUT, "m", "svg"))
    assert "torch eager" in written and f"{BOUND}, a bound: 90× to 90×, not drawn" in written


@pytest.mark.parametrize("case", ["one row", "no products", "no baselines", "no layer", "many settings"])
def test_whatever_was_measured(case: str) -> None:
    found = {
        "one row": rows()[:1],
        "no products": [replace(row, flops=0.0) for row in rows()],
        "no baselines": [replace(row, baselines={}) for row in rows()],
        "no layer": [row for row in rows() if "layer" not in row.shape],
        "many settings": [replace(row, dtype=dtype) for row in rows() for dtype in ROOFS.matmul],
    }[case]
    assert size(draw(found, ROOFS, ABOUT, "m")) == size(draw(rows(), ROOFS, ABOUT, "m"))
