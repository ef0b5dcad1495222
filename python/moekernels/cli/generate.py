"""`moekernels generate`: continue a text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from moekernels.cli.device import add_device_argument, now, resolve_device
from moekernels.generation import BaseStreamer, TextStreamer
from moekernels.models import AutoModelForCausalLM
from moekernels.tokenizers import AutoTokenizer


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text with a checkpoint on disk",
        description="Continue a text. The text goes to stdout as it appears, speeds go to stderr.",
        epilog="Without a sampling option the checkpoint's own settings decide; --temperature 0 is greedy.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, with its tokenizer")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue; read from stdin if not given, or '-'")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="X", help="divide the scores by X; 0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens; 0 is all")
    sampling.add_argument("--top-p", type=float, metavar="X", help="draw from the likeliest tokens that sum to X")
    sampling.add_argument("--min-p", type=float, metavar="X", help="leave out tokens below X times the likeliest")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text")
    running = parser.add_argument_group("running")
    running.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; auto is the checkpoint's")
    add_device_argument(running)
    running.add_argument("--attn-implementation", metavar="NAME", help="sdpa or eager")
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


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The generation parameters that were given. Asking for sampling is enough to get it."""
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.temperature == 0:
        unused = [f"--{name.replace('_', '-')}" for name in given if name != "temperature"]
        if unused:
            raise ValueError(f"--temperature 0 always takes the likeliest token; {', '.join(unused)} cannot apply")
        given = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    elif given:
        given["do_sample"] = True
    if args.repetition_penalty is not None:
        given["repetition_penalty"] = args.repetition_penalty
    return {**given, "max_new_tokens": args.max_new_tokens, "seed": args.seed}


def run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    parameters = _parameters(args)
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    if not prompt:
        raise ValueError("there is no prompt: give --prompt, or text on stdin")

    start = now(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, device=device, attn_implementation=args.attn_implementation
    )
    print(f"loaded {args.model} in {now(device) - start:.1f} s: {_size(model)} on {device}", file=sys.stderr)

    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    printer = None if args.no_stream else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    clock = _Clock(printer, device)
    ids = model.generate(**inputs, **parameters, tokenizer=tokenizer, streamer=clock)
    if args.no_stream:
        print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print(clock.report(), file=sys.stderr)
    return 0


def _size(model: Any) -> str:
    return f"{model.num_parameters() / 1e6:,.1f} M weights, {str(model.dtype).removeprefix('torch.')}"
