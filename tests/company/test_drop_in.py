"""The table of the drop-in, as tests."""

from __future__ import annotations

import pytest

from tests.company import (  # noqa: F401 - they fill the table
    rows,
    rows_accelerate,
    rows_compile,
    rows_peft,
    rows_processes,
    rows_torchao,
)
from tests.company.drop_in import COLUMNS
from tests.company.matrix import ROWS, Column, Row, verdict

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_others(row: Row, column: Column) -> None:
    if reason := row.missing(column):
        pytest.skip(reason)
    found = verdict(row, column)
    assert found.is_right, found.detail
