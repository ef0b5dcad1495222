"""`moekernels demo`: trains a tiny model to translate numbers that are written out, and looks into it."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moekernels import build_info
from moekernels._devices import named_device
from moekernels.cli.checks import check_layers
from moekernels.cli.device import add_device_argument
from moekernels.cli.table import listing, table
from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS, Learner
from moekernels.demo.numbers import LANGUAGES
from moekernels.demo.training import exact_matches, train
from moekernels.demo.usage import Usage, draw, expert_usage

_SEED = 0
_STEPS = {"nllb-moe": 450, "switch": 1300, "olmoe": 600, "phimoe": 700}
_REQUIRED = 0.99
_SHOWN = 6
_USAGE_PAIRS = 300


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a tiny model to translate, check it and look into it; no download",
        description="Train a tiny mixture of experts to translate written-out numbers between English, French and "
        "German, save it, load it, translate numbers it has never seen, check routing and experts of every sparse "
        "layer against their definitions, and show which experts each language uses. Exit code 1 if less than 99 "
        "percent of the translations are right to the letter, or a check fails.",
    )
    parser.add_argument("--model", choices=LEARNERS, default="nllb-moe", help="the architecture (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of training (default: enough)")
    parser.add_argument(
        "--keep", metavar="DIR", help="write the checkpoint and the picture to DIR, and leave them there"
    )
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    device = named_device(args.device)
    steps = _STEPS[args.model] if args.steps is None else args.steps
    if steps < 1:
        raise ValueError(f"demo: --steps must be at least 1, got {steps}")
    with contextlib.ExitStack() as stack:
        if args.keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moekernels-demo-")))
        else:
            directory = Path(args.keep)
            directory.mkdir(parents=True, exist_ok=True)
        corpus = Corpus()
        learner = _trained(args.model, corpus, steps, device)
        learner.save(directory)
        learner = LEARNERS[args.model].load(directory)
        learner.model.to(device)
        passed = _translated(learner, corpus, directory, kept=args.keep is not None)
        passed &= _checked(learner, corpus)
        _shown(learner, corpus, directory, kept=args.keep is not None)
    print(f"\n{'all checks passed' if passed else 'A CHECK FAILED'}, {time.perf_counter() - start:.1f} s")
    return 0 if passed else 1


def _trained(name: str, corpus: Corpus, steps: int, device: torch.device) -> Learner:
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(_SEED)
        learner = LEARNERS[name].create(corpus)
        learner.model.to(device)
        print(listing(_described(learner, corpus, device)), flush=True)
        losses = train(learner, corpus, num_steps=steps, seed=_SEED)
        with tqdm(losses, total=steps, desc="training", unit="step", disable=None) as bar:
            for loss in bar:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    print(f"\ntrained {steps} steps; the last loss was {loss:.4f}")
    return learner


def _described(learner: Learner, corpus: Corpus, device: torch.device) -> dict[str, str]:
    num_held_out, num_train = len(corpus.held_out), len(corpus.train)
    weights = learner.model.num_parameters() / 1e6
    return {
        "kernels": _kernels(device),
        "task": f"numbers in words, {', '.join(LANGUAGES)}; {num_held_out} of {num_held_out + num_train:,} held out",
        "model": f"{type(learner.model).__name__}, {weights:.1f} million weights",
    }


def _translated(learner: Learner, corpus: Corpus, directory: Path, kept: bool) -> bool:
    """Exact matches of the saved checkpoint on all that was held out, and a few translations by beam search."""
    size = sum(file.stat().st_size for file in directory.iterdir())
    pairs = corpus.held_out_pairs()
    right = exact_matches(learner, pairs)
    shown = pairs[::7][:_SHOWN]  # of every direction
    texts = learner.translate(shown, num_beams=4)
    rows = [
        (
            f"{pair.source_language} to {pair.target_language}",
            pair.source,
            text,
            "right" if text == pair.target else "WRONG",
        )
        for pair, text in zip(shown, texts, strict=True)
    ]
    enough = right >= _REQUIRED * len(pairs)
    matches = f"{right:,} of {len(pairs):,} translations are right to the letter ({right / len(pairs):.2%})"
    print(
        listing(
            {
                "checkpoint": f"{directory}{'' if kept else ' (temporary)'}, {size / 1e6:.1f} MB, saved and loaded",
                "held out": matches if enough else f"{matches}: FAILED, less than {_REQUIRED:.0%}",
            }
        )
    )
    print("\nnumbers it has never seen, by beam search\n")
    print(table(("", "source", "translation", ""), rows, left=4))
    return enough


def _checked(learner: Learner, corpus: Corpus) -> bool:
    """Every sparse layer against the definitions of its ops."""
    batch = learner.batch(corpus.held_out_pairs()[:32])
    checks = check_layers(learner.model, batch)
    print("\nthe routing of every sparse layer against its definition, and the experts against theirs in float64\n")
    rows = [
        (
            c.layer,
            str(c.misrouted),
            *map("{:.1e}".format, (c.error, c.plain_error, c.allowed)),
            "ok" if c.passed else "FAILED",
        )
        for c in checks
    ]
    print(table(("layer", "misrouted tokens", "error", "plain PyTorch", "allowed", ""), rows))
    return bool(checks) and all(check.passed for check in checks)


def _shown(learner: Learner, corpus: Corpus, directory: Path, kept: bool) -> None:
    """Which experts each language uses, as a table and, where matplotlib is, as a picture."""
    usage = expert_usage(learner, corpus.held_out_pairs()[:_USAGE_PAIRS], tuple(LANGUAGES))
    print("\nexperts by language, in percent of its tokens' choices\n")
    print(table(("layer", "language", *map(str, range(_num_experts(usage)))), _usage_rows(usage), left=2))
    print(f"\nwith the capacity of training, {usage.dropped_rate:.1%} of {usage.chosen:,} choices find no place")
    try:
        draw(usage, directory / "experts.png")
    except ImportError:
        print("(no picture: pip install 'moekernels[plot]')")
    else:
        print(f"picture: {directory / 'experts.png'}" if kept else "picture: drawn; --keep DIR keeps it")


def _num_experts(usage: Usage) -> int:
    return next(iter(usage.counts.values())).shape[1]


def _usage_rows(usage: Usage) -> list[tuple[str, ...]]:
    return [
        (layer, language, *(f"{share:.0%}".removesuffix("%") for share in shares))
        for layer in usage.counts
        for language, shares in zip(usage.languages, usage.shares(layer).tolist(), strict=True)
    ]


def _kernels(device: torch.device) -> str:
    build = build_info()
    if device.type == "cuda":
        return f"CUDA ({', '.join(build['cuda_archs'])}) on {torch.cuda.get_device_name(device)}"
    return f"CPU, {build['cpu_isa']}, {torch.get_num_threads()} threads; torch {build['torch_running']}"
