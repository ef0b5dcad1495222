"""Aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need to be, the first `left` of them aligned left and the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def listing(entries: dict[str, str]) -> str:
    """Names and values in two columns; further lines of a value are indented below its first."""
    width = max(map(len, entries), default=0)
    gap = "\n" + " " * (width + 2)
    return "\n".join(f"{name.ljust(width)}  {gap.join(value.splitlines())}".rstrip() for name, value in entries.items())
