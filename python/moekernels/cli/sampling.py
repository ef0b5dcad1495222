"""Options of the commands that generate text, and the model they are for."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from moekernels.cli.device import add_device_argument, now
from moekernels.cli.experts import add_expert_memory_argument
from moekernels.cli.ranks import loading_options
from moekernels.cli.weights import add_weights_argument, quantization_argument
from moekernels.models import AutoModelForCausalLM
from moekernels.tokenizers import AutoTokenizer

EPILOG = "Without a sampling option the checkpoint's own settings decide; --temperature 0 is greedy."


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="X", help="divide the scores by X; 0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens; 0 is all")
    sampling.add_argument("--top-p", type=float, metavar="X", help="draw from the likeliest tokens that sum to X")
    sampling.add_argument("--min-p", type=float, metavar="X", help="leave out tokens below X times the likeliest")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text")


def add_running_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    running = parser.add_argument_group("running")
    running.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; auto is the checkpoint's")
    add_weights_argument(running)
    add_device_argument(running)
    running.add_argument("--attn-implementation", metavar="NAME", help="sdpa or eager")
    add_expert_memory_argument(running)
    return running


def generation_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The generation parameters that were given. Asking for sampling is enough to get it.

    Raises:
        ValueError: an option has no effect with another.
    """
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


def load_model(args: argparse.Namespace, device: torch.device, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model and the tokenizer of `--model`; stderr says what was loaded."""
    start = now(device)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=args.dtype,
        device=device,
        attn_implementation=args.attn_implementation,
        expert_memory=args.expert_memory,
        **loading_options(args),
        **quantization_argument(args),
    )
    size = f"{model.num_parameters() / 1e6:,.1f} M weights, {args.weights or str(model.dtype).removeprefix('torch.')}"
    print(f"loaded {args.model} in {now(device) - start:.1f} s: {size} on {device}", file=sys.stderr)
    return model, tokenizer
