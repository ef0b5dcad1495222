"""This revision beside another one: the same work in two processes that take turns, so that both meet the same machine.

    python benchmarks/regression.py --against HEAD~20
    python benchmarks/regression.py --against v0.1 --rows "layer bfloat16 1" "import" --seconds 30 --at-least 0.98

Builds the other revision into build/regression/ once, beside the torch that is installed; this revision is the package
that is installed. Prints, per row, both medians and how many times as fast this revision is, with the quartiles of the
pairs. Rows of few tokens show what share of the read bandwidth they reach, read in turns with them. Exits 1 if a row is
slower than `--at-least`. A row that one of the two does not have, or fails at, says so, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.regression_rows import ROWS, bytes_read

ROOT = Path(__file__).resolve().parent.parent


def build(revision: str) -> Path:
    """A folder with the package as of `revision`, built unless it is there."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", f"{revision}^{{commit}}"],
                            check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    folder = ROOT / "build" / "regression" / commit[:12]
    if not (folder / "site" / "moekernels").exists():
        source = folder / "source"
        source.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", source]
        subprocess.run(pip, check=True, env={**os.environ, "MOEKERNELS_CUDA": "off"})
    return folder / "site"


class Worker:
    """A process that runs the rows with one of the two packages."""

    def __init__(self, site: Path | None) -> None:
        command = [sys.executable, ROOT / "benchmarks" / "regression_rows.py", *([site] if site else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        about = self._answer()
        self.revision = about["revision"]
        if site is not None and not about["package"].startswith(str(site)):
            raise RuntimeError(f"the other revision was imported from {about['package']}, not from {site}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, command: str, row: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, row]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Result(NamedTuple):
    """Seconds of a row, pair by pair, and of reading a GiB before each pair if the row reads."""

    ours: list[float]
    theirs: list[float]
    reads: list[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def measure(row: str, ours: Worker, theirs: Worker, seconds: float) -> Result:
    reads = bytes_read(row) is not None
    for worker in (ours, theirs):
        worker.ask("prepare", row)
    result = Result([], [], [])
    begin = time.perf_counter()
    while len(result.ours) < 3 or time.perf_counter() - begin < seconds:
        if reads:
            result.reads.append(ours.ask("run", "read"))
        turns = [(ours, result.ours), (theirs, result.theirs)]
        for worker, times in turns if len(result.ours) % 2 else turns[::-1]:  # neither is always the first
            times.append(worker.ask("run", row))
    return result


def render(row: str, result: Result) -> str:
    ours, theirs = statistics.median(result.ours), statistics.median(result.theirs)
    low, middle, high = statistics.quantiles(result.ratios, n=4)
    share = "–"
    if result.reads and (num_bytes := bytes_read(row)):
        # The fastest quarters, since a busy neighbour slows single calls of either.
        rate, roof = (statistics.quantiles(times, n=4)[0] for times in (result.ours, result.reads))
        share = f"{num_bytes / rate / (bytes_read('read') / roof):.0%}"
    return f"| {row} | {ours * 1e3:.2f} | {theirs * 1e3:.2f} | **{middle:.2f}×** ({low:.2f}–{high:.2f}) | {share} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REVISION")
    parser.add_argument("--rows", nargs="+", choices=[row for row in ROWS if row != "read"], metavar="ROW",
                        default=[row for row in ROWS if row != "read"],
                        help="; ".join(row for row in ROWS if row != "read"))  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring per row")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="RATIO", help="exit 1 if a row's median is less")
    args = parser.parse_args()

    site = build(args.against)
    ours, theirs = Worker(None), Worker(site)
    print(f"this: {ours.revision}; the other: {args.against}\n")
    print("| row | this ms | other ms | times as fast (quartiles) | of the read bandwidth |")
    print("| --- | --- | --- | --- | --- |")
    slower = []
    for worker in (ours, theirs):
        worker.ask("prepare", "read")
    for row in args.rows:
        try:
            result = measure(row, ours, theirs, args.seconds)
        except RuntimeError as error:
            print(f"| {row} | failed: {error} | | | |", flush=True)
            slower.append(row)
            ours.close(), theirs.close()
            ours, theirs = Worker(None), Worker(site)
            ours.ask("prepare", "read")
            continue
        print(render(row, result), flush=True)
        if statistics.median(result.ratios) < args.at_least:
            slower.append(row)
    ours.close(), theirs.close()
    if slower:
        print(f"\nslower than {args.at_least}×, or failed: {', '.join(slower)}")
    return bool(slower) and args.at_least > 0


if __name__ == "__main__":
    sys.exit(main())
