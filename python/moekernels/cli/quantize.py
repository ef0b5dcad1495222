"""`moekernels quantize`: a checkpoint with smaller weights."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from moekernels.cli.weights import FORMATS
from moekernels.models import BitsAndBytesConfig, QuantizationConfig
from moekernels.models.converting import quantize_checkpoint
from moekernels.models.quantization import AnyConfig

_BITSANDBYTES = ("nf4", "fp4", "int8")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with weights in 4 or 8 bits",
        description="Write a checkpoint whose Linears and experts are quantised; head, embeddings, routers and norms "
        "stay as they are. A few experts are in memory at a time. The files take their places once all are on disk.",
        epilog="nf4, fp4 and int8 are written as bitsandbytes has them, which transformers 4 reads too; with "
        "--skip-modules without a name in a layout of our own.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, or its name on the hub")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--group-size", type=int, metavar="N", help="int4: weights that share a scale, 32 or 64")
    parser.add_argument("--double-quant", action="store_true", help="nf4, fp4: quantise the scales too")
    parser.add_argument(
        "--skip-modules", nargs="*", metavar="NAME",
        help="modules that stay whole (default: the head), by name or path; without a name the head is quantised "
        "too (one that is tied to the embedding not with --double-quant)",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file (default: 2GB)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    size = quantize_checkpoint(args.model, args.output, _config(args), max_shard_size=args.max_shard_size)
    print(f"{args.output}: {size / 1e9:.2f} GB in {args.to}, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


def _config(args: argparse.Namespace) -> AnyConfig:
    if args.group_size is not None and args.to != "int4":
        raise ValueError(f"--group-size is for int4, got --to {args.to}")
    if args.double_quant and args.to not in ("nf4", "fp4"):
        raise ValueError(f"--double-quant is for nf4 and fp4, got --to {args.to}")
    if args.to not in _BITSANDBYTES or args.skip_modules == []:  # bitsandbytes has no tied head that is quantised
        options = {} if args.group_size is None else {"group_size": args.group_size}
        if args.double_quant:
            options["double_quant"] = True
        return QuantizationConfig(args.to, options, skip_modules=args.skip_modules)
    if args.to == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=args.skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.to,
        bnb_4bit_use_double_quant=args.double_quant,
        llm_int8_skip_modules=args.skip_modules,
    )
