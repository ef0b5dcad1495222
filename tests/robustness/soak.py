"""Generates, or trains, for a long time, and watches memory: it must not grow.

python -m tests.robustness.soak generate --minutes 30
python -m tests.robustness.soak train --steps 100 --every 0

The first fifth is warm-up. Exit code 1 if the median of the last fifth lies more than `--tolerance` MiB above that of
the second fifth, or if Python objects, threads or open files grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS
from moekernels.demo.training import train

_MIB = 2**20


class Sample(NamedTuple):
    """What a process holds: resident memory in MiB, Python objects, threads, open files."""

    resident: float
    objects: int
    threads: int
    files: int


def sample() -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / _MIB
    return Sample(resident, len(gc.get_objects()), threading.active_count(), len(os.listdir("/proc/self/fd")))


def generating(seed: int = 0) -> Iterator[None]:
    """Batches of other sizes, lengths and strategies every time, as a server sees them; all four learners in turn."""
    rng = random.Random(seed)
    corpus = Corpus()
    learners = [kind.create(corpus) for kind in LEARNERS.values()]
    pairs = corpus.held_out_pairs()
    strategies: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
    ]
    for learner in learners:
        learner.model.eval()
    while True:
        learner = rng.choice(learners)
        learner.translate(rng.sample(pairs, rng.randint(1, 12)), **rng.choice(strategies))
        yield


def training() -> Iterator[None]:
    """Steps of the demo's loop, with a new model and optimizer every sixty."""
    corpus = Corpus()
    while True:
        for name in LEARNERS:
            for _ in train(LEARNERS[name].create(corpus), corpus, num_steps=60, batch_size=24):
                yield


WORK: dict[str, Callable[[], Iterator[None]]] = {"generate": generating, "train": training}


def soak(work: Iterator[None], every: float, seconds: float, steps: int | None = None) -> tuple[list[Sample], int]:
    """Work for so many steps, or for so long; samples taken every so many seconds, and the steps done."""
    samples, done = [], 0
    begun = time.monotonic()
    due = begun
    while time.monotonic() < begun + seconds if steps is None else done < steps:
        next(work)
        done += 1
        if time.monotonic() >= due:
            samples.append(sample())
            due += every
    return samples, done


def growth(samples: list[Sample]) -> dict[str, float]:
    """Median of the last fifth minus that of the second fifth, of everything that is counted."""
    fifth = max(len(samples) // 5, 1)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return {
        name: statistics.median(getattr(s, name) for s in late) - statistics.median(getattr(s, name) for s in early)
        for name in Sample._fields
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--every", type=float, default=10, help="seconds between samples")
    parser.add_argument("--tolerance", type=float, default=8, help="MiB")
    args = parser.parse_args()
    torch.manual_seed(0)
    samples, steps = soak(WORK[args.work](), args.every, 60 * args.minutes, args.steps)
    grown = growth(samples)
    first, last = samples[len(samples) // 5], samples[-1]
    print(json.dumps({"work": args.work, "steps": steps, "samples": len(samples), "growth": grown}))
    print(json.dumps({"after the warm-up": first._asdict(), "at the end": last._asdict()}))
    flat = grown["resident"] <= args.tolerance and grown["threads"] <= 0 and grown["files"] <= 0
    return 0 if flat and grown["objects"] <= 0.01 * first.objects else 1


if __name__ == "__main__":
    sys.exit(main())
