from __future__ import annotations

from moekernels.cli.table import listing, table


def test_columns_are_aligned() -> None:
    text = table(("op", "time"), [("route", "1.5"), ("a longer name", "1,200.0")])
    assert text.splitlines() == [
        "op                time",
        "-------------  -------",
        "route              1.5",
        "a longer name  1,200.0",
    ]
    assert table(("a", "b"), []) == "a  b\n-  -"


def test_values_of_several_lines_are_indented() -> None:
    assert listing({"name": "x", "devices": "cpu\ncuda"}) == "name     x\ndevices  cpu\n         cuda"
