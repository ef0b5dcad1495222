"""The rows that are also run in two processes."""

from __future__ import annotations

from tests.processes import run_processes


def _verdicts(rank: int) -> list[str]:
    from tests.company import rows_processes  # noqa: F401 - fills the table
    from tests.company.drop_in import COLUMNS
    from tests.company.matrix import ROWS, verdict

    lines = []
    for row in ROWS.values():
        if row.processes < 2:
            continue
        for column in COLUMNS:
            found = verdict(row, column)
            lines.append(f"{row.name}, {column.name}: {found.kind} {found.detail!r}")
    return lines


def test_two_processes() -> None:
    for lines in run_processes(_verdicts, 2):
        assert lines
        for line in lines:
            assert line.split(": ", 1)[1].startswith(("kernels", "modules")), line
