"""`moekernels repack`: a checkpoint written anew for `--expert-memory`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from moekernels.checkpoint import repack
from moekernels.models.configuration import parse_dtype


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "repack",
        help="write a checkpoint for reading expert by expert",
        description="Write a checkpoint anew so that the parts of each expert lie together and aligned, for "
        "--expert-memory. Pickles become safetensors. Any program that reads checkpoints of the hub reads the result.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to; another directory")
    parser.add_argument("--dtype", metavar="NAME", help="convert weights: bfloat16, float16, float32")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    repack(args.model, args.output, dtype=parse_dtype(args.dtype), max_shard_size=args.max_shard_size)
    print(f"wrote {args.output} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0
