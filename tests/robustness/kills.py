"""Kills programs that write files at random moments: what is on disk must be the old or the new, and load.

python -m tests.robustness.kills --kills 200

A third each: `save_pretrained` over an older checkpoint (single files and shards in every combination), `moekernels
translate --output` over an older translation, and the demo's training, which ends in saving over an older model. Exit
code 1 if one leaves something else.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekernels.checkpoint import CheckpointReader
from moekernels.cli import main as command
from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS, Learner
from moekernels.demo.training import train
from moekernels.models import AutoModelForSeq2SeqLM
from moekernels.tokenizers import AutoTokenizer


def killed_after(seconds: float, work: Callable[[], Any]) -> bool:
    """Run something in a child that is killed after so long; whether it was, before it had ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if status:
                raise RuntimeError(f"the child failed by itself: {os.waitstatus_to_exitcode(status)}")
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def duration(work: Callable[[], Any]) -> float:
    """How long it takes when it is not killed."""
    begun = time.monotonic()
    if killed_after(600, work):
        raise RuntimeError("it takes too long")
    return time.monotonic() - begun


class Killer:
    """Kills a program at random moments, and learns how long it takes from the times it comes too late.

    Args:
        seconds: what the program took at first.
        rng: draws the moments.
    """

    def __init__(self, seconds: float, rng: random.Random) -> None:
        self.seconds, self.rng = seconds, rng

    def kill(self, work: Callable[[], Any], begin: float = 0.0) -> bool:
        """Kill it in the part of its time from `begin` on; whether that was before its end."""
        begun = time.monotonic()
        was_killed = killed_after(self.rng.uniform(begin, 1.0) * self.seconds, work)
        self.seconds = 1.03 * self.seconds if was_killed else (self.seconds + time.monotonic() - begun) / 2
        return was_killed


def _value(directory: Path) -> float:
    """The value that every weight of a checkpoint has."""
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, progress=False)
    values = {float(parameter.detach().min()) for parameter in model.parameters()}
    values |= {float(parameter.detach().max()) for parameter in model.parameters()}
    if len(values) != 1 or model.config.mark != values.copy().pop():
        raise ValueError(f"{directory}: weights {sorted(values)[:5]} under the mark {model.config.mark}")
    return values.pop()


class Saving:
    """`save_pretrained` of weights that are all 2 over a checkpoint in which all are 1."""

    name = "save_pretrained"
    sizes = ("5GB", "300KB")

    def __init__(self, root: Path, learner: Learner, rng: random.Random) -> None:
        self.root, self.learner, self.rng = root, learner, rng
        self.killer = Killer(duration(lambda: self._save(root / "timed", 1.0, "300KB")), rng)

    def _save(self, directory: Path, value: float, size: str) -> None:
        model = self.learner.model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.config.mark = value
        model.save_pretrained(directory, max_shard_size=size)

    def kill(self) -> tuple[bool, str]:
        directory = self.root / "checkpoint"
        shutil.rmtree(directory, ignore_errors=True)
        self._save(directory, 1.0, self.rng.choice(self.sizes))
        (directory / "notes.txt").write_text("the user's own")
        size = self.rng.choice(self.sizes)
        was_killed = self.killer.kill(lambda: self._save(directory, 2.0, size))
        # Who reads the weights alone, before anyone completes the save, sees those of one model.
        raw = {float(t.min()) for shard in CheckpointReader(directory).shards() for _, t in shard}
        if len(raw) != 1:
            raise ValueError(f"{directory}: weights of two models: {raw}")
        found = "new" if _value(directory) == 2.0 else "old"
        if (directory / "notes.txt").read_text() != "the user's own" or (not was_killed and found == "old"):
            raise ValueError(f"{directory}: {sorted(os.listdir(directory))}, {found}")
        return was_killed, found


class Translating:
    """`moekernels translate` to a file that has an older translation."""

    name = "translate --output"

    def __init__(self, root: Path, learner: Learner, rng: random.Random) -> None:
        self.root, self.model = root, root / "translator"
        learner.save(self.model)
        pairs = Corpus().held_out_pairs()[:96]
        (root / "source.txt").write_text("".join(f"{pair.source}\n" for pair in pairs), encoding="utf-8")
        self.killer = Killer(duration(lambda: self._translate(root / "whole.txt")), rng)
        self.whole = (root / "whole.txt").read_bytes()

    def _translate(self, output: Path) -> None:
        status = command(
            ["translate", "--model", str(self.model), "--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn",
             "--max-new-tokens", "12", "--output", str(output), str(self.root / "source.txt")]
        )  # fmt: skip
        if status:
            raise RuntimeError(f"translate ended with {status}")

    def kill(self) -> tuple[bool, str]:
        output = self.root / "translation.txt"
        output.write_text("an older one\n")
        was_killed = self.killer.kill(lambda: self._translate(output))
        found = {b"an older one\n": "old", self.whole: "new"}.get(output.read_bytes())
        if found is None or (not was_killed and found == "old"):
            raise ValueError(f"{output} is neither the old nor the new: {output.read_bytes()[:200]!r}")
        for left in self.root.glob(".translation.txt.*"):
            left.unlink()
        return was_killed, found


class Training:
    """The demo's training, which in the end saves model and tokenizer over those of another architecture."""

    name = "training"

    def __init__(self, root: Path, learner: Learner, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.killer = Killer(duration(lambda: self._train(root / "trained")), rng)

    def _train(self, directory: Path) -> None:
        learner = LEARNERS["olmoe"].create(Corpus())
        for _ in train(learner, Corpus(), num_steps=3, batch_size=8):
            pass
        learner.save(directory)

    def kill(self) -> tuple[bool, str]:
        directory = self.root / "demo"
        shutil.rmtree(directory, ignore_errors=True)
        LEARNERS["phimoe"].create(Corpus()).save(directory)
        # Most of it is training; more than half of the kills fall into its last part, where it saves.
        was_killed = self.killer.kill(lambda: self._train(directory), begin=self.rng.choice((0.0, 0.8, 0.8)))
        kind = json.loads((directory / "config.json").read_text())["model_type"]  # of whatever is there now
        found = {"olmoe": "new", "phimoe": "old"}[kind]
        name = type(AutoTokenizer.from_pretrained(directory)).__name__
        completed = json.loads((directory / "config.json").read_text())["model_type"]
        learner = LEARNERS[completed].load(directory)
        learner.translate(Corpus().held_out_pairs()[:2])
        if (completed == "olmoe") != (name == "GPTNeoXTokenizerFast") or (not was_killed and found == "old"):
            raise ValueError(f"{directory}: {completed} with {name}")
        return was_killed, "new" if completed == "olmoe" else "old"


def run(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many times, each program in turn; how often what was found. A kill that comes too late does not count."""
    rng = random.Random(seed)
    torch.manual_seed(0)
    learner = LEARNERS["nllb-moe"].create(Corpus())
    programs = [Translating(root, learner, rng), Saving(root, learner, rng), Training(root, learner, rng)]
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    done = turn = 0
    while done < kills and turn < 10 * kills:
        program = programs[turn % len(programs)]
        turn += 1
        try:
            was_killed, found = program.kill()
            counts[f"{program.name}: {'killed' if was_killed else 'ended'}, {found}"] += 1
            done += was_killed
        except KeyboardInterrupt:  # as many as there was time for
            break
        except Exception as error:
            wrong.append(f"{turn}: {program.name}: {type(error).__name__}: {error}")
    return {"kills": done, "counts": dict(sorted(counts.items())), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which ends it with what it has, in the background too
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        report = run(Path(root), args.kills, args.seed)
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
