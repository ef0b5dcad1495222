"""The option that says in how many bits weights are held."""

from __future__ import annotations

import argparse
from typing import Any

#: Formats that weights can be quantised to.
FORMATS = ("int4", "int8", "nf4", "fp4", "q8_0", "q4_0")


def add_weights_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weights",
        metavar="FORMAT",
        choices=FORMATS,
        help=f"quantise the weights while loading: {', '.join(FORMATS)} (default: as the checkpoint has them)",
    )
    parser.add_argument(
        "--activations",
        choices=["int8"],
        help="beside --weights int4 or int8: round what is multiplied to 8 bits (faster, less accurate)",
    )


def quantization_argument(args: argparse.Namespace) -> dict[str, Any]:
    """What `--weights` and `--activations` are for `from_pretrained`.

    Raises:
        ValueError: the format has no integers to multiply with.
    """
    if args.activations is None:
        return {} if args.weights is None else {"quantization_config": {"format": args.weights}}
    if args.weights not in ("int4", "int8"):
        raise ValueError(f"--activations {args.activations} goes with --weights int4 or int8, got {args.weights}")
    return {"quantization_config": {"format": args.weights, "activations": args.activations}}
