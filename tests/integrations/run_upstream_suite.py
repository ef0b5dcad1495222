"""Runs transformers' own tests of the models that the drop-in knows: stock, and with the drop-in in every model.

    python tests/integrations/run_upstream_suite.py --upstream PATH [--models olmoe phimoe] [--python PYTHON]

PATH is a checkout of transformers' repository: `tests/` and `utils/` of a release or of a commit on the way to it, and
`src/transformers` of the same, or a link to where it is installed. Without `--python`, an environment is made that sees
the packages of this one, with the release and what its tests need from the package index. `--save DIRECTORY` keeps what
became of every test.

Those tests hold a model against itself, not against a definition, so that a drop-in that is ignored passes too.
Therefore the calls of our kernels are counted. The result is 1 if a test fails with the drop-in that passes without
it, or if a model never called a kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.integrations.in_newest import make_environment  # noqa: E402

# Those whose experts follow the experts interface of transformers 5.
INTERFACE = (
    "olmoe", "phimoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe", "jamba",
    "lfm2_moe", "nemotron_h",
)  # fmt: skip
MODELS = ("olmoe", "phimoe", "switch_transformers", "nllb_moe")  # by default; any of INTERFACE may be named
# Several processes, checkpoints from the hub, and compilation for minutes.
EXCLUDED = "not test_tp_ and not test_ep_ and not fsdp and not hsdp and not IntegrationTest and not compil"


class Expected(NamedTuple):
    """A failure that `replace_moe_layers` causes on purpose.

    Attributes:
        message: a pattern for all of what the test says; one that fails with another is wrong.
    """

    message: str
    why: str


# By how the name of the test begins.
EXPECTED = {
    "test_eager_matches_batched_and_grouped_inference": Expected(
        r"AssertionError: Expected 'mock' to have been called\.",
        "wants transformers' own functions called; ours are instead",
    ),
}
TEST_REQUIREMENTS = (
    "pytest<9",
    "pytest-xdist",
    "pytest-order",
    "pytest-rerunfailures",
    "accelerate",
    "parameterized",
    "psutil",
    "httpx",
    "datasets<4.2",
)


@dataclass
class Suite:
    """What the tests of one model did, one way.

    Attributes:
        outcomes: test -> "passed", "failed" or "skipped".
        messages: test that failed -> its exception.
        calls: of our kernels, in the process of the tests.
        refused: message -> how often `replace_moe_layers` raised it; those models stayed as they were.
    """

    model: str
    way: str
    outcomes: dict[str, str]
    messages: dict[str, str]
    calls: int
    refused: dict[str, int]
    seconds: float

    @property
    def failed(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome == "failed"}

    def row(self) -> str:
        count = Counter(self.outcomes.values())
        cells = [self.model, self.way, *(str(count[outcome]) for outcome in ("passed", "failed", "skipped"))]
        return f"| {' | '.join(cells)} | {self.calls} | {self.seconds:.0f} |"


def run_suite(python: Path, upstream: Path, model: str, way: str, options: Sequence[str] = ()) -> Suite:
    """The tests of one model in a process of their own.

    Raises:
        RuntimeError: pytest collected nothing, or did not finish.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        import moekernels

        # The checkout's transformers first; its `tests` is a package of the same name as ours, which stays out. Of
        # what lies beside our package nothing comes along: in site-packages that is another huggingface_hub.
        ours = Path(directory) / "path"
        ours.mkdir()
        (ours / "moekernels").symlink_to(Path(moekernels.__file__).resolve().parent, target_is_directory=True)
        path = [upstream / "src", ours, Path(__file__).resolve().parent]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")]),
            "MOEKERNELS_UPSTREAM_WAY": way,
            "MOEKERNELS_UPSTREAM_REPORT": str(report),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [str(python), "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider"]
        command += [*options, f"tests/models/{model}"]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=upstream, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        # 1: tests failed, which is a result.
        if done.returncode not in (0, 1) or not report.exists():
            output = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise RuntimeError(f"pytest ended with {done.returncode} for {model} ({way}) in {upstream}:\n{output}")
        found = json.loads(report.read_text())
    calls = sum(found["calls"].values())
    return Suite(model, way, found["outcomes"], found["messages"], calls, found["refused"], seconds)


def compare(stock: Suite, ours: Suite) -> tuple[list[str], list[str]]:
    """What is wrong with the drop-in, and what is otherwise on purpose, in words.

    Wrong are tests that passed without it and do not with it, and kernels that were never called.
    """
    wrong, intended = [], []
    for test in sorted(stock.outcomes.keys() | ours.failed):
        outcome = ours.outcomes.get(test, "not run")
        if outcome == "passed" or outcome == stock.outcomes.get(test) or stock.outcomes.get(test) == "failed":
            continue
        what = f"{ours.model} ({ours.way}): {test} is {outcome}, and {stock.outcomes.get(test, 'not run')} when stock"
        message = ours.messages.get(test, "")
        reason = why_expected(test, message) if ours.way == "replace" and outcome == "failed" else None
        if reason is not None:
            intended.append(f"{what}: {reason}")
        else:
            wrong.append(f"{what}: {message.splitlines()[0]}" if message else what)
    if not ours.calls:
        wrong.append(f"{ours.model} ({ours.way}): no call reached our kernels")
    return wrong, intended


def why_expected(test: str, message: str) -> str | None:
    """Why the test fails on purpose with that message; None if it does not."""
    name = test.rpartition("::")[2]
    for begin, expected in EXPECTED.items():
        if name.startswith(begin) and re.fullmatch(expected.message, message, re.DOTALL):
            return expected.why
    return None


def version_of(upstream: Path) -> str:
    """The release of transformers in a checkout.

    Raises:
        ValueError: it is none.
    """
    path = upstream / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"', path.read_text(), re.MULTILINE) if path.exists() else None
    if found is None:
        raise ValueError(f"{path} has no __version__: {upstream} is no checkout of transformers with its src/")
    return found[1]


def release_of(version: str) -> str:
    """The release that follows a commit between releases; its requirements are in the package index."""
    return re.sub(r"\.dev\d+$", "", version)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, metavar="PATH", help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", choices=sorted({*MODELS, *INTERFACE}), default=MODELS)
    parser.add_argument("--python", type=Path, help="of an environment that has all that the tests need")
    parser.add_argument("--save", type=Path, metavar="DIRECTORY", help="for MODEL-WAY.json, the outcome of every test")
    parser.add_argument("--exclude", default=EXCLUDED, metavar="EXPRESSION", help="pytest's -k (default: %(default)s)")
    args = parser.parse_args(arguments)
    upstream = args.upstream.resolve()
    version = version_of(upstream)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)

    def run(model: str, way: str) -> Suite:
        suite = run_suite(python, upstream, model, way, ["-k", args.exclude])
        print(suite.row(), flush=True)
        if args.save:
            (args.save / f"{model}-{way}.json").write_text(json.dumps(asdict(suite), indent=1) + "\n")
        return suite

    with tempfile.TemporaryDirectory() as temporary:
        python = args.python or make_environment(
            Path(temporary) / "environment", [f"transformers=={release_of(version)}", *TEST_REQUIREMENTS]
        )
        print(f"transformers {version}: {args.exclude}\n")
        print("| tests of | models | pass | fail | skip | kernel calls | seconds |\n" + "| --- " * 7 + "|")
        wrong: list[str] = []
        intended: list[str] = []
        refused: Counter[str] = Counter()
        for model in args.models:
            stock = run(model, "stock")
            interface = int(version.partition(".")[0]) >= 5 and model in INTERFACE
            for way in ("replace", "register") if interface else ("replace",):
                ours = run(model, way)
                for found, more in zip((wrong, intended), compare(stock, ours), strict=True):
                    found += more
                refused.update(ours.refused)
    print()
    for message, count in refused.items():
        print(f"{count} models stayed stock: {message}")
    for what in intended:
        print(f"intended: {what}")
    print("\n".join(wrong) or "No other test fails that passes without the drop-in.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
