"""Prints what others do to a model, and what became of it, as a table in Markdown.

    python tests/company/table.py [--rows TEXT] [--details]

"kernels": equal to the reference, and the kernels computed the experts; "modules": equal, by calling the modules;
"error": refused with a clear error before anything is computed; "as stock": fails without us as well.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from tests.company import (  # noqa: F401 - they fill the table
    rows,
    rows_accelerate,
    rows_compile,
    rows_peft,
    rows_processes,
    rows_torchao,
)
from tests.company.drop_in import COLUMNS
from tests.company.matrix import ROWS, verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only those whose name has this text")
    parser.add_argument("--details", action="store_true", help="of errors and differences, below the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(f"| | {' | '.join(column.name for column in COLUMNS)} |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    details, right = [], True
    for row in ROWS.values():
        if arguments.rows not in row.name:
            continue
        found = [verdict(row, column) for column in COLUMNS]
        print(f"| {row.name} | {' | '.join('' if v.kind == 'none' else v.kind for v in found)} |", flush=True)
        right &= all(v.is_right for v in found)
        details += [f"{row.name}, {c.name}: {v.detail}" for c, v in zip(COLUMNS, found, strict=True) if v.detail]
    if arguments.details:
        print("\n" + "\n".join(details))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
