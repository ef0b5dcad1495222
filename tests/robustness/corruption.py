"""Breaks checkpoints of the five models in random ways: each must give a clear error, or a model that runs.

python -m tests.robustness.corruption --trials 10000 --seed 1

Every trial is a process of its own, which may take neither more memory nor time than a small multiple of what the true
checkpoint takes. Exit code 1 if a trial ends in any other way. `--only N` repeats one, in this process.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekernels.models import AutoConfig
from moekernels.models.auto import ARCHITECTURES
from moekernels.tokenizers import AutoTokenizer
from tests.robustness import checkpoints, children, mutations

_MIB = 2**20
TEXT = "Life is like a river: 12 ships __fr__ <extra_id_1> eng_Latn."
#: What a caller can be expected to handle. ImportError: a chat template, or attention, that needs a package.
CLEAR = (ValueError, FileNotFoundError, PermissionError)


class Bounds(NamedTuple):
    """What trials may take: multiples of what the largest true checkpoint took, and never less than a floor."""

    memory: int
    seconds: float


def attempt(directory: Path) -> dict[str, str]:
    """Load and use the model and the tokenizer of a checkpoint: "runs", or the error of each."""
    warnings.simplefilter("ignore")
    return {"model": _tried(directory, _use_model), "tokenizer": _tried(directory, _use_tokenizer)}


def _tried(directory: Path, use: Any) -> str:
    loading = True

    def loaded() -> None:
        nonlocal loading
        loading = False

    try:
        use(directory, loaded)
    except CLEAR as error:
        if loading and str(directory) not in str(error):
            return f"names no file: {type(error).__name__}: {error}"[:500]
        return f"clear: {'loading' if loading else 'running'}: {type(error).__name__}: {error}"[:500]
    except BaseException as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
        stage = "loading" if loading else "running"
        return f"unclear: {stage}: {type(error).__module__}.{type(error).__name__}: {error} ({line})"[:700]
    return "runs"


def _use_model(directory: Path, loaded: Any) -> None:
    config = AutoConfig.from_pretrained(directory)
    architecture = ARCHITECTURES[type(config).model_type]
    kind: Any = architecture.causal_lm or architecture.seq2seq_lm
    model = kind.from_pretrained(directory, progress=False)
    loaded()
    inputs = checkpoints.inputs(model.config)
    extra = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(**inputs, **extra)
    model.generate(**inputs, max_new_tokens=3, max_length=None)


def _use_tokenizer(directory: Path, loaded: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loaded()
    tokenizer.decode(tokenizer(TEXT).input_ids)
    len(tokenizer)


def bounds(directories: list[Path]) -> Bounds:
    """From what the true checkpoints take; all of them must run."""
    memory, seconds = 0, 0.0
    for directory in directories:
        attempt(directory)  # imports and caches, which children then begin with
        outcome = children.run(functools.partial(attempt, directory), seconds=60, memory=4096 * _MIB)
        if outcome.result is None or set(outcome.result.values()) != {"runs"}:
            raise RuntimeError(f"the true checkpoint {directory} does not run: {outcome}")
        memory, seconds = max(memory, outcome.memory), max(seconds, outcome.seconds)
    return Bounds(4 * memory + 32 * _MIB, max(10 * seconds, 3.0))


def trial(root: Path, directories: list[Path], seed: int, number: int) -> tuple[Path, str, str]:
    """Make the broken checkpoint of a trial: where it is, which mutation made it, and what that did."""
    rng = random.Random(f"{seed}/{number}")
    true = directories[number % len(directories)]
    broken = root / "broken" / true.name
    shutil.rmtree(root / "broken", ignore_errors=True)
    shutil.copytree(true, broken)
    try:
        name, done = mutations.mutate(broken, rng)
    except (ValueError, IndexError) as error:  # nothing there to change in that way
        name, done = "none", f"{error}"
    return broken, name, f"{true.name}: {done}"


def failure(outcome: children.Outcome, limits: Bounds, broken: Path) -> str:
    """What is wrong with how a trial ended; empty if nothing."""
    if (broken / "EXECUTED").exists() or outcome.died == "exit 66":
        return "EXECUTED"
    if outcome.result is None:
        return f"died: {outcome.died}"
    unclear = [f"{part}: {said}" for part, said in outcome.result.items() if not said.startswith(("runs", "clear: "))]
    if unclear:
        return "; ".join(unclear)
    if outcome.memory > limits.memory:
        return f"took {outcome.memory / _MIB:.0f} MiB, bound {limits.memory / _MIB:.0f}"
    if outcome.seconds > limits.seconds:
        return f"took {outcome.seconds:.1f} s, bound {limits.seconds:.1f}"
    return ""


def run(root: Path, trials: int, seed: int, first: int = 0, log: Path | None = None) -> dict[str, Any]:
    """Run trials and count how they ended; failures are listed with all that is known of them."""
    directories = checkpoints.write_all(root / "true")
    limits = bounds(directories)
    counts: collections.Counter[str] = collections.Counter()
    by_mutation: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    largest, longest, begun = 0, 0.0, time.monotonic()
    done_trials = 0
    for number in range(first, first + trials):
        try:
            broken, name, done = trial(root, directories, seed, number)
            child = functools.partial(attempt, broken)
            outcome = children.run(child, seconds=2 * limits.seconds, memory=1024 * _MIB)
        except KeyboardInterrupt:  # as many as there was time for
            break
        done_trials += 1
        wrong = failure(outcome, limits, broken)
        if number % 500 == 499:
            print(f"{number + 1 - first} of {trials} trials, {len(failures)} failed", file=sys.stderr, flush=True)
        by_mutation[name] += 1
        largest, longest = max(largest, outcome.memory), max(longest, outcome.seconds)
        if wrong:
            failures.append({"trial": number, "mutation": name, "done": done[:300], "wrong": wrong})
            if log:
                with log.open("a") as file:
                    print(json.dumps(failures[-1]), file=file)
        else:
            for part, said in outcome.result.items():
                counts[f"{part} {'runs' if said == 'runs' else 'clear error, ' + said.split(': ')[1]}"] += 1
    return {
        "trials": done_trials,
        "failures": failures,
        "counts": dict(sorted(counts.items())),
        "mutations": dict(sorted(by_mutation.items())),
        "bounds": {"MiB": round(limits.memory / _MIB, 1), "s": round(limits.seconds, 2)},
        "largest": {"MiB": round(largest / _MIB, 1), "s": round(longest, 2)},
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--only", type=int, help="repeat this trial, in this process")
    parser.add_argument("--log", type=Path, help="append failures here as they are found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which ends it with what it has, in the background too
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        root = Path(folder)
        if args.only is not None:
            broken, name, done = trial(root, checkpoints.write_all(root / "true"), args.seed, args.only)
            print(name, done, json.dumps(attempt(broken), indent=1), sep="\n")
            return 0
        report = run(root, args.trials, args.seed, args.first, args.log)
    failures = report.pop("failures")
    print(json.dumps({**report, "failed": len(failures)}, indent=1))
    for entry in failures[:50]:
        print(json.dumps(entry))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
