"""`moekernels run`: a pipeline over lines of text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from moekernels._devices import named_device
from moekernels.cli.device import add_device_argument
from moekernels.cli.experts import add_expert_memory_argument, print_expert_stats
from moekernels.cli.files import Lines, add_errors_argument, output_file
from moekernels.cli.ranks import add_expert_parallel_argument, loading_options
from moekernels.cli.weights import add_weights_argument, quantization_argument
from moekernels.pipelines import TASKS, Pipeline, pipeline
from moekernels.pipelines.batching import BATCHES_PER_WINDOW, windows


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run a task on lines of text",
        description="Run a task on every line of a text. There is a line of output for every line: a list of results.",
        epilog=f"tasks: {', '.join(TASKS)}, translation_XX_to_YY",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="UTF-8 text; stdin if not given, or '-'")
    parser.add_argument("--task", required=True, metavar="TASK", help="what to do; see below")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, or its name on the hub")
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer is, if not with the model")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    add_errors_argument(parser)
    parser.add_argument("--json", action="store_true", help="write lists as JSON, not as Python")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many")
    generation.add_argument("--num-beams", type=int, metavar="N", help="beams of the search; 1 is greedy")
    generation.add_argument("--num-return-sequences", type=int, metavar="N", help="results for every line")
    generation.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="draw, or take the likeliest")
    generation.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text")
    generation.add_argument("--src-lang", metavar="CODE", help="for translation: the language of the text")
    generation.add_argument("--tgt-lang", metavar="CODE", help="for translation: the language to translate to")
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=int, default=1, metavar="N", help="lines to run together (default: 1)")
    running.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; auto is the checkpoint's")
    add_weights_argument(running)
    add_device_argument(running)
    add_expert_memory_argument(running)
    add_expert_parallel_argument(running)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    names = ("max_new_tokens", "num_beams", "num_return_sequences", "do_sample", "seed", "src_lang", "tgt_lang")
    parameters = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "classification" in args.task and parameters:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in parameters)
        raise ValueError(f"{args.task} generates nothing; {listed} cannot apply")
    # A file is read before the output is opened, which may be the same one.
    lines = Lines(args.file, args.errors)
    pipe = pipeline(
        args.task,
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=named_device(args.device),
        batch_size=args.batch_size,
        model_kwargs={"expert_memory": args.expert_memory, **quantization_argument(args), **loading_options(args)},
        **parameters,
    )
    with ExitStack() as stack:
        output = sys.stdout
        if args.output is not None:
            output = stack.enter_context(output_file(args.output))
        for window in windows(lines, 1 if args.batch_size == 1 else args.batch_size * BATCHES_PER_WINDOW):
            for results in _results(pipe, window):
                print(json.dumps(results, ensure_ascii=False) if args.json else results, file=output)
            output.flush()
    print_expert_stats(pipe.model)
    return 1 if lines.broken else 0


def _results(pipe: Pipeline, lines: list[str]) -> Iterable[list[dict[str, Any]]]:
    """The results for each line; none for a blank one."""
    texts = [line.strip() for line in lines]
    # An iterator, because for a list some tasks leave out the lists within.
    found = pipe(iter([text for text in texts if text]))
    for text in texts:
        results = next(found) if text else []
        yield [results] if isinstance(results, dict) else results
