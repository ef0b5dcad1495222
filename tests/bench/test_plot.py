from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from moekernels.bench.roofs import Roofs
from moekernels.bench.table import Row

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
