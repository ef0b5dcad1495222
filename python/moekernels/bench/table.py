"""The rows of a measurement, as a table with fixed columns and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moekernels._files import write_file
from moekernels.bench.machine import described
from moekernels.bench.roofs import Roofs

# The column of a bound rather than a baseline: as many FLOPs in dense products of equal size.
BOUND = "batched matmul"
COLUMNS = ("shape", "tokens", "routing", "dtype", "µs", "GFLOP/s", "GB/s", "% of roof")


@dataclass
class Row:
    """What one piece of work took.

    Attributes:
        shape: the layer, and which part of it.
        seconds: the median of a call.
        flops: of the products it must sum; 0 where it has none.
        bytes: it must move at least.
        roof: the fraction of the nearer roof; None where no roof was measured.
        baselines: the seconds of others.
        clock: how the times were taken.
        failures: baselines that were not timed, and why: "fails" or "differs", a colon, and what happened.
    """

    shape: str
    tokens: int
    routing: str
    dtype: str
    seconds: float
    flops: float
    bytes: float
    roof: float | None
    baselines: dict[str, float] = field(default_factory=dict)
    clock: str = ""
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Against the fastest baseline that does the same work."""
        seconds = [value for name, value in self.baselines.items() if name != BOUND]
        return min(seconds) / self.seconds if seconds else None


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a table: the columns, then how many times faster than each baseline.

    A baseline that was not timed "fails" or "differs" instead. The clock has a column where rows differ in it.
    """
    baselines = list(dict.fromkeys(name for row in rows for name in (*row.baselines, *row.failures)))
    clocks = len({row.clock for row in rows}) > 1
    header = [*COLUMNS, *(f"× {name}" for name in baselines), *(["clock"] if clocks else [])]
    return header, [_cells(row, baselines) + ([row.clock] if clocks else []) for row in rows]


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    return [
        row.shape,
        str(row.tokens),
        row.routing,
        row.dtype,
        _number(row.seconds * 1e6),
        _number(row.flops / row.seconds / 1e9) if row.flops else "–",
        _number(row.bytes / row.seconds / 1e9),
        f"{row.roof:.0%}" if row.roof is not None else "–",
        *(_beside(row, name) for name in baselines),
    ]


def _beside(row: Row, baseline: str) -> str:
    if baseline in row.baselines:
        return f"{row.baselines[baseline] / row.seconds:.2f}"
    return row.failures.get(baseline, "–").partition(":")[0]


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def render(rows: Sequence[Row], roofs: Roofs, about: dict[str, object]) -> str:
    """The table in Markdown, below the machine and its roofs."""
    header, body = cells(rows)
    lines = [described(about), f"roofs: {roofs}", ""]
    lines += ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]
    return "\n".join(lines)


def record(
    rows: Sequence[Row], roofs: Roofs, about: dict[str, object], command: str, mismatches: Sequence[str] = ()
) -> str:
    """All of it as JSON."""
    content = {"command": command, "machine": about, "roofs": asdict(roofs), "rows": [asdict(row) for row in rows]}
    return json.dumps({**content, "mismatches": list(mismatches)}, indent=1) + "\n"


def save(path: Path, rows: Sequence[Row], roofs: Roofs, about: dict[str, object], command: str) -> None:
    """The rows as JSON, and the table as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, record(rows, roofs, about, command))
    write_file(path.with_suffix(".md"), f"`{command}`\n\n{render(rows, roofs, about)}\n")


def load(path: Path) -> tuple[list[Row], Roofs, dict[str, object]]:
    """The rows, roofs and machine of a file that :func:`record` made.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        rows = [Row(**row) for row in content["rows"]]
        return rows, Roofs(**content["roofs"]), dict(content["machine"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no rows of a measurement ({type(error).__name__}: {error})") from None
