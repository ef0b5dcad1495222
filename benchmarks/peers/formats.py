"""The formats of our weights beside those of other engines."""

from __future__ import annotations

import argparse
from typing import Any

from moekernels.quantization import Format, parse_format


def add_activations_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--activations", choices=["int8"], help="round rows too; with int4 and int8")


def format_of(args: argparse.Namespace) -> tuple[Format | None, str]:
    """What `--weights` and `--activations` ask for, and how rows of tables name it: not at all if weights are whole."""
    if args.weights is None:
        return None, ""
    options: dict[str, Any] = {} if args.activations is None else {"activations": args.activations}
    name = args.weights + (" int8 rows" if options else "") + (" and head" if args.head else "")
    return parse_format(args.weights, **options), name
