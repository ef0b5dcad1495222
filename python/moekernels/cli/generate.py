"""`moekernels generate`: continue a text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from moekernels._devices import named_device
from moekernels.cli.device import now
from moekernels.cli.experts import print_expert_stats
from moekernels.cli.files import read_stdin
from moekernels.cli.ranks import add_expert_parallel_argument
from moekernels.cli.sampling import (
    EPILOG,
    add_running_arguments,
    add_sampling_arguments,
    generation_parameters,
    load_model,
)
from moekernels.generation import BaseStreamer, TextStreamer


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text with a checkpoint on disk",
        description="Continue a text. The text goes to stdout as it appears, speeds go to stderr.",
        epilog=EPILOG,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, with its tokenizer")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue; read from stdin if not given, or '-'")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    add_sampling_arguments(parser)
    running = add_running_arguments(parser)
    add_expert_parallel_argument(running)
    running.add_argument("--no-stream", action="store_true", help="print the text once it is complete")
    parser.set_defaults(run=run)


class _Clock(BaseStreamer):
    """Passes tokens on, and notes when the prompt went in and when tokens came out."""

    def __init__(self, streamer: BaseStreamer | None, device: torch.device) -> None:
        self._streamer = streamer
        self._device = device
        self._prompt_tokens = 0
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        self._times.append(now(self._device))
        if len(self._times) == 1:
            self._prompt_tokens = value.numel()
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()

    def report(self) -> str:
        start, first, last = self._times[0], self._times[1], self._times[-1]
        prefill = f"prefill {self._prompt_tokens} tokens, {self._prompt_tokens / (first - start):.1f} tokens/s"
        steps = len(self._times) - 2
        if steps == 0:
            return prefill
        return f"{prefill}; decode {steps} tokens, {steps / (last - first):.1f} tokens/s"


def run(args: argparse.Namespace) -> int:
    device = named_device(args.device)
    parameters = generation_parameters(args)
    prompt = read_stdin() if args.prompt in (None, "-") else args.prompt
    if not prompt:
        raise ValueError("there is no prompt: give --prompt, or text on stdin")

    model, tokenizer = load_model(args, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    printer = None if args.no_stream else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    clock = _Clock(printer, device)
    ids = model.generate(**inputs, **parameters, tokenizer=tokenizer, streamer=clock)
    if args.no_stream:
        print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print(clock.report(), file=sys.stderr)
    print_expert_stats(model)
    return 0
